"""wandb may fail in every way; a run must not notice. The faults happen in a real process."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from fake_wandb import install
from runs import train as train_run
from runs import without_pictures, write_config

from moetrain import cli, settings
from moetrain.build import build_model
from moetrain.mesh import Mesh
from moetrain.sinks import read_metrics
from moetrain.sizes import sizes
from moetrain.testing import simulate_ranks
from moetrain.train import set_up, train
from moetrain.wandb_sink import WandbSink, flatten

CONFIG = {"seed": 1}
REASONS = {
    "raise": "RuntimeError: no network at {when}",
    "exit": "SystemExit: leaving",
    "die": "its process ended with code -9",
    "block": "within 0.5 s",
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A wandb that only the child can see; returns what it was told so far."""
    return install(tmp_path, monkeypatch)


def sink(tmp_path, mode: Literal["offline", "online"] = "online", resumed=False, **limits):
    limits = {"start_s": 60, "close_s": 60} | limits
    return WandbSink(tmp_path / "run", mode, "project", "name", CONFIG, resumed, **limits)


def log_steps(target, num_steps):
    """Write lines; returns the longest that one took."""
    slowest = 0.0
    for step in range(1, num_steps + 1):
        start = time.perf_counter()
        target.write({"step": step, "loss": 1.0, "layers": []})
        slowest = max(slowest, time.perf_counter() - start)
    return slowest


def test_every_line_arrives_in_order_and_the_run_is_finished(tmp_path, fake, caplog):
    target = sink(tmp_path)
    log_steps(target, 50)
    target.close()
    kinds = [kind for kind, _ in fake()]
    assert kinds == ["init", "define", *["log"] * 50, "finish"]
    assert [value["step"] for kind, value in fake() if kind == "log"] == list(range(1, 51))
    init = fake()[0][1]
    assert (init["project"], init["name"], init["config"]) == ("project", "name", CONFIG)
    assert init["dir"] == str(tmp_path / "run")
    assert not caplog.records
    assert "chatter" in (tmp_path / "run" / "wandb" / "process.log").read_text()


@pytest.mark.parametrize("when", ["INIT", "LOG", "FINISH"])
@pytest.mark.parametrize("action", ["raise", "exit", "die", "block"])
def test_a_failure_is_one_warning_and_never_a_wait(
    tmp_path, fake, monkeypatch, caplog, when, action
):
    monkeypatch.setenv("FAKE_" + when, action)
    limit = 0.5 if action == "block" else 60
    target = sink(tmp_path, start_s=limit, close_s=limit)
    slowest = log_steps(target, 30)
    time.sleep(0.1)
    slowest = max(slowest, log_steps(target, 30))
    start = time.perf_counter()
    target.close()
    assert time.perf_counter() - start < 5
    assert slowest < 0.45
    assert len(caplog.records) == 1
    assert "wandb is off for the rest of this run" in caplog.text
    assert REASONS[action].format(when=when) in caplog.text
    assert target._child.poll() is not None


def test_a_wandb_that_lags_behind_is_given_up(tmp_path, fake, monkeypatch, caplog):
    monkeypatch.setenv("FAKE_LOG", "block")
    target = sink(tmp_path)
    assert log_steps(target, 5000) < 2
    start = time.perf_counter()
    target.close()
    assert time.perf_counter() - start < 5
    assert [record.getMessage().rsplit(": ")[1] for record in caplog.records] == [
        "it is 1000 lines behind"
    ]


def test_close_waits_for_lines_that_fill_the_queue(tmp_path, fake, monkeypatch, caplog):
    monkeypatch.setenv("FAKE_INIT", "slow")
    target = sink(tmp_path)
    num_lines = 0
    while not target._queue.full():
        num_lines += 1
        target.write({"step": num_lines, "padding" * 100: 1})
    target.close()
    assert not caplog.records
    assert [value["step"] for kind, value in fake() if kind == "log"] == list(
        range(1, num_lines + 1)
    )


def test_it_continues_the_same_wandb_run_only_when_resumed(tmp_path, fake):
    for resumed in (False, True, False):
        target = sink(tmp_path, resumed=resumed)
        target.close()
    first, second, third = (value["id"] for kind, value in fake() if kind == "init")
    assert first == second != third


def test_the_child_ends_with_a_killed_run(tmp_path, fake):
    script = (
        "import sys, time; from pathlib import Path;"
        "from moetrain.wandb_sink import WandbSink;"
        "sink = WandbSink(Path(sys.argv[1]), 'online', 'p', 'n', {}, False);"
        "sink.write({'step': 1}); print(sink._child.pid, flush=True); time.sleep(100)"
    )
    root = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": root + os.pathsep + os.environ["PYTHONPATH"]}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as run:
        assert run.stdout is not None
        child = int(run.stdout.readline())
        wait_until(lambda: ["log", {"step": 1}] in fake())
        run.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_running(child))
    assert fake()[-1] == ["finish", None]


def wait_until(condition, timeout_s=60):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if condition():
                return
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


FIGURES = ["drop_rate", "token_drop_rate", "dropped_gate_mass", "padding_waste"]
FIGURES += ["capacity_factor", "effective_capacity_factor", "max_vio", "load_cv"]
FIGURES += ["load_entropy", "dead_experts"]


def layer(value, load, by_choice):
    counts = {"assigned": 9, "slots": 9, "row_load": load, "outcomes_by_rank": [[1, 0, 0, 0]] * 64}
    return dict.fromkeys(FIGURES, value) | {"load": load, "drop_rate_by_choice": by_choice} | counts


def test_numbers_of_a_line_by_name():
    layers = [layer(0.5, [1, 2], [0.25]), layer(0, [3, 0], [0.5])]
    assert flatten({"step": 3, "mfu": None, "loss": 2.0, "layers": layers}) == {
        "step": 3,
        "loss": 2.0,
        **{f"{name}/layer_00": 0.5 for name in FIGURES},
        "load/layer_00": [1, 2],
        "drop_rate_by_choice/layer_00": [0.25],
        **{f"{name}/layer_01": 0 for name in FIGURES},
        "load/layer_01": [3, 0],
        "drop_rate_by_choice/layer_01": [0.5],
    }
    assert flatten({"step": 3, "eval_loss": 2.0}) == {"step": 3, "eval_loss": 2.0}
    dropless = layer(0, [3, 0], [0.5]) | {"capacity_factor": None}
    assert "capacity_factor/layer_00" not in flatten({"step": 3, "layers": [dropless]})


def test_of_times_by_rank_the_longest_over_the_median_is_shown():
    times = {"data_s_by_rank": [1.0, 2.0, 8.0], "probe_s_by_rank": [3.0, 2.0]}
    assert flatten({"step": 3, **times}) == {"step": 3, "spread/data_s": 4, "spread/probe_s": 1.5}
    alone = {"data_s_by_rank": [1.0], "probe_s_by_rank": []}
    assert flatten({"step": 3, **alone}) == {"step": 3, "spread/data_s": 1}
    assert flatten({"step": 3, "data_s_by_rank": [0.0, 0.0, 1.0]}) == {"step": 3}


def test_what_is_sent_does_not_grow_with_experts_choices_and_ranks():
    few = flatten({"step": 3, "layers": [layer(0, [1] * 4, [0])]})
    many = flatten({"step": 3, "layers": [layer(0, [1] * 512, [0] * 512)]})
    assert few.keys() == many.keys()
    more = flatten({"step": 3, "layers": [layer(0, [1] * 513, [0] * 8)]})
    assert few.keys() - more.keys() == {"load/layer_00"}


def test_a_list_arrives_as_a_histogram_with_a_bar_for_each_entry(tmp_path, fake):
    target = sink(tmp_path)
    target.write({"step": 1, "layers": [layer(0.5, [5, 1, 0], [0.5])]})
    target.close()
    (logged,) = [value for kind, value in fake() if kind == "log"]
    assert logged["load/layer_00"] == {"values": [5, 1, 0], "bins": [0, 1, 2, 3]}
    assert logged["drop_rate_by_choice/layer_00"] == {"values": [0.5], "bins": [0, 1]}
    assert logged["drop_rate/layer_00"] == 0.5


def evaluation(step: int, loss: float) -> dict[str, float]:
    return {"step": step, "eval_loss": loss, "eval_drop_rate": 0.25}


def test_the_summary_holds_the_best_evaluation_also_of_before_a_restart(tmp_path, fake):
    target = sink(tmp_path)
    target.compare(evaluation(2, 3.0))
    for step, loss in ((4, 3.5), (6, 2.5), (8, float("nan")), (10, 2.75)):
        target.write(evaluation(step, loss))
    target.close()
    told = [value for kind, value in fake() if kind == "summary"]
    assert told == [
        {"best_step": 2, "best_eval_loss": 3.0, "best_eval_drop_rate": 0.25},
        {"best_step": 6, "best_eval_loss": 2.5, "best_eval_drop_rate": 0.25},
    ]


def saved_run(tmp_path: Path) -> dict[str, Path]:
    """A folder and a file beside it, by the names they have in an artifact."""
    folder = tmp_path / "run" / "checkpoints" / "step-00000008"
    folder.mkdir(parents=True)
    (folder / "tensors").write_bytes(bytes(100))
    (tmp_path / "run" / "config.yaml").write_text("seed: 1")
    return {
        "checkpoints/step-00000008": folder,
        "config.yaml": tmp_path / "run" / "config.yaml",
    }


@pytest.mark.parametrize(("mode", "policy"), [("online", "immutable"), ("offline", "mutable")])
def test_an_artifact_holds_the_files_as_they_lie_in_the_run(tmp_path, fake, caplog, mode, policy):
    target = sink(tmp_path, mode=mode)
    target.keep(saved_run(tmp_path), "name", {"step": 8, "eval_loss": 2.5})
    target.close()
    ((_, kept),) = [line for line in fake() if line[0] == "artifact"]
    assert kept == {
        "name": "name",
        "type": "model",
        "metadata": {"step": 8, "eval_loss": 2.5},
        "files": {
            "checkpoints/step-00000008/tensors": [policy, 100],
            "config.yaml": [policy, 7],
        },
    }
    assert fake()[-1] == ["finish", None]
    assert not caplog.records


@pytest.mark.parametrize(
    ("when", "action", "reason", "is_finished"),
    [
        ("KEEP", "raise", "the checkpoint is not kept: RuntimeError: no network at KEEP", True),
        ("WAIT", "raise", "the checkpoint is not kept: RuntimeError: no network at WAIT", True),
        ("WAIT", "block", "it did not keep the checkpoint within 0.5 s", False),
        ("WAIT", "die", "its process ended with code -9", False),
    ],
)
def test_an_artifact_that_fails_is_one_warning_in_bounded_time(
    tmp_path, fake, monkeypatch, caplog, when, action, reason, is_finished
):
    monkeypatch.setenv("FAKE_" + when, action)
    target = sink(tmp_path, keep_s=0.5 if action == "block" else 60)
    log_steps(target, 3)
    target.keep(saved_run(tmp_path), "name", {"step": 8})
    target.close()
    (record,) = caplog.records
    assert record.getMessage() == f"wandb has not all of this run: {reason}"
    kinds = [kind for kind, _ in fake() if kind != "artifact"]
    assert kinds == ["init", "define", *["log"] * 3, *["finish"] * is_finished]


def test_a_checkpoint_that_is_gone_costs_the_artifact_alone(tmp_path, fake, caplog):
    target = sink(tmp_path)
    files = saved_run(tmp_path)
    shutil.rmtree(files["checkpoints/step-00000008"])
    target.keep(files, "name", {"step": 8})
    target.close()
    (record,) = caplog.records
    assert "the checkpoint is not kept: FileNotFoundError" in record.getMessage()
    assert [kind for kind, _ in fake()] == ["init", "define", "finish"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """No key anywhere, and a home where stray files show."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_real_wandb_offline_keeps_its_files_in_the_run(tmp_path, home, caplog):
    target = sink(tmp_path, mode="offline")
    log_steps(target, 5)
    target.write({"step": 6, "layers": [layer(0.5, [5, 1, 0], [0.5])]})
    target.close()
    assert not caplog.records
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = written.read_bytes()
    assert b"loss" in content
    assert b"drop_rate/layer_00" in content
    assert b'"histogram"' in content
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_the_real_wandb_without_a_key(tmp_path, home, caplog):
    target = sink(tmp_path)
    wait_until(lambda: target._child.poll() is not None)
    log_steps(target, 5)
    target.close()
    assert len(caplog.records) == 1
    assert "API key" in caplog.text


def hang_up(server: socket.socket) -> None:
    """Close every connection as soon as it is made, until the server is closed."""
    with contextlib.suppress(OSError):
        while True:
            server.accept()[0].close()


@pytest.mark.parametrize("answer", ["silence", "hanging up"])
def test_the_real_wandb_and_a_server_that_never_answers(
    tmp_path, home, monkeypatch, caplog, answer
):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        if answer == "hanging up":
            threading.Thread(target=hang_up, args=(server,), daemon=True).start()
        target = sink(tmp_path, start_s=2, close_s=1)
        assert log_steps(target, 5) < 1.5
        wait_until(lambda: target._child.poll() is not None)
        start = time.perf_counter()
        target.close()
    assert time.perf_counter() - start < 3
    assert len(caplog.records) == 1


PROJECT = {"name": "project", "entity": {"name": "someone"}}
ANSWER = {
    "viewer": {"entity": "someone", "flags": "{}", "teams": {"edges": []}},
    "serverInfo": {"features": []},
    "model": None,
    "upsertBucket": {"bucket": {"id": "1", "name": "x", "project": PROJECT}, "inserted": True},
}


class Server(BaseHTTPRequestHandler):
    """Lets a run begin, and is silent from the moment on at which it sends its first lines."""

    is_silent, is_over = threading.Event(), threading.Event()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path.endswith("/file_stream"):
            self.is_silent.set()
        if self.is_silent.is_set() or self.path != "/graphql":
            self.is_over.wait()
            return
        content = json.dumps({"data": ANSWER}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Nothing."""


def test_the_real_wandb_and_a_server_that_falls_silent_midway(tmp_path, home, monkeypatch, caplog):
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        target = sink(tmp_path, close_s=1)
        log_steps(target, 5)
        assert Server.is_silent.wait(60)
        assert not caplog.records, "it had begun"
        log_steps(target, 5)
        target.close()
        Server.is_over.set()
        server.shutdown()
    (record,) = caplog.records
    assert "it did not finish within 1 s" in record.getMessage()
    assert target._child.poll() is not None


def records(run_dir: Path) -> list[Any]:
    """What the real wandb wrote down offline: a log in blocks of 32 KiB, as LevelDB has it."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    content, found, whole = path.read_bytes(), [], b""
    place = 7  # after the file's own header
    while place < len(content):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of a record, or the last piece
            found.append(Record.FromString(whole))
            whole = b""
    return found


def test_a_run_in_the_real_wandb_offline(tmp_path, home, caplog):
    """Config, summary and the last checkpoint, which is a run that can be evaluated from."""
    log = {"wandb": "offline", "wandb_artifacts": True}
    path = write_config(tmp_path, eval={"every": 4}, checkpoint={"every": 4, "keep": 1}, log=log)
    assert train_run(path) == 0
    assert not [record for record in caplog.records if record.name.startswith("moetrain")]
    run = tmp_path / "runs" / "run"
    told = records(run)
    config, summary = {}, {}
    for record in told:
        config |= {x.key: json.loads(x.value_json) for x in record.run.config.update}
        summary |= {x.key or "/".join(x.nested_key): x.value_json for x in record.summary.update}
    assert config["moe"]["experts"] == 4
    counted = sizes(build_model(settings.load(path), 257))
    assert config["parameters"] == {"total": counted.total, "active": counted.active}
    assert (config["ranks"], config["device"], config["computes_in"]) == (1, "cpu", "fp32")

    evaluations = [line for line in read_metrics(run) if "eval_loss" in line]
    best = min(evaluations, key=lambda line: line["eval_loss"])
    for name, value in best.items():
        assert json.loads(summary[f"best_{name}"]) == value
    assert json.loads(summary["eval_loss"]) == evaluations[-1]["eval_loss"]
    assert json.loads(summary["step"]) == 8

    (artifact,) = [record.artifact for record in told if record.HasField("artifact")]
    assert (artifact.name, artifact.type) == ("run", "model")
    assert json.loads(artifact.metadata) == evaluations[-1]
    copy = tmp_path / "copy"
    for entry in artifact.manifest.contents:
        (copy / entry.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(entry.local_path, copy / entry.path)
    assert cli.main(["checkpoint", "diff", str(copy), str(run)]) == 0
    assert cli.main(["eval", str(copy)]) == 0
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_a_resumed_run_tells_of_the_best_evaluation_before(tmp_path, fake):
    every = {"eval": {"every": 4}, "checkpoint": {"every": 4}}
    path = write_config(tmp_path, log={"wandb": "online"}, **every)
    assert train_run(path) == 0
    lines = [line for line in read_metrics(tmp_path / "runs" / "run") if "eval_loss" in line]
    best = min(lines, key=lambda line: line["eval_loss"])
    before = len(fake())
    assert train_run(path, "--train.steps", 9) == 0
    (kind, told), *_ = [line for line in fake()[before:] if line[0] not in ("init", "define")]
    assert (kind, told) == ("summary", {f"best_{name}": value for name, value in best.items()})


@pytest.mark.parametrize("when", ["FAKE_INIT", "FAKE_LOG"])
def test_no_rank_of_a_run_waits_for_it(tmp_path, monkeypatch, caplog, when):
    """wandb hangs until the rank without it has trained to the end. Then it goes on, and has
    missed nothing."""
    record = install(tmp_path, monkeypatch)
    free = tmp_path / "free"
    monkeypatch.setenv(when, "wait")
    monkeypatch.setenv("FAKE_UNTIL", str(free))
    off = {"every": 0}
    made = settings.load(write_config(tmp_path, log={"wandb": "online"}, eval=off, checkpoint=off))

    def of_rank() -> None:
        mesh = Mesh(torch.device("cpu"))
        train(set_up(made, tmp_path / "runs" / "run", mesh))
        if mesh.rank == 1:
            free.touch()

    with without_pictures():
        simulate_ranks(2, of_rank)
    assert not caplog.records
    kinds = [kind for kind, _ in record()]
    assert kinds == ["init", "define", *["log"] * made.train.steps, "finish"]
