"""A run killed for real, and what it is once it has been resumed: the run that was never killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import pytest
import torch
from runs import assert_same_bits, lines_without_timings, without_pictures, write_config

from moetrain import checkpoint, cli, settings
from moetrain.mesh import Mesh
from moetrain.sinks import read_metrics
from moetrain.train import set_up, train

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 24, 4
# gshard draws its second experts at random, which a resumed run must draw alike.
SECTIONS = {
    "moe": {"router": "gshard", "top_k": 2},
    "parallel": {"ep": 2},
    "train": {"steps": STEPS},
    "eval": {"every": 10},
    "checkpoint": {"every": EVERY, "keep": 3, "asynchronous": True},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("resume"), name="killed", **SECTIONS)


@pytest.fixture(scope="module")
def runs(config, ranks2) -> Path:
    """The folder with a run that was killed and resumed, and one that was not."""
    killed = config.parent / "runs" / "killed"
    process = launch(config)
    wait_for(lambda: checkpoint.latest(killed) is not None, process)
    kill_all(process)
    last = read_metrics(killed)[-1]["step"]
    assert EVERY <= last < STEPS, "it was to be killed on the way"
    saved = checkpoint.latest(killed)
    assert saved is not None
    output = ranks2.run(train_on, config, "killed")[0]
    assert re.search(rf"on 2 ranks \(\w+\), from step {int(saved.name[5:])}\n", output), output
    assert "from the start" in ranks2.run(train_on, config, "whole")[0]
    return config.parent / "runs"


def train_on(config: Path, name: str) -> str:
    """The rest of a run; returns what it says."""
    made = settings.load(config, ["--name", name])
    mesh = Mesh(torch.device("cpu"), made.parallel.ep)
    with without_pictures(), redirect_stdout(StringIO()) as said:
        train(set_up(made, settings.run_directory(made.out, made.name), mesh))
    return said.getvalue()


def launch(config: Path) -> subprocess.Popen[str]:
    """Two ranks of `moetrain train`."""
    command = "-m moetrain.torchrun --nproc-per-node=2 -m moetrain train"
    return subprocess.Popen(
        [sys.executable, *command.split(), str(config)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint yet"
        time.sleep(0.01)


def children(parent: int) -> list[int]:
    """Processes that another one started, as Linux tells."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may have ended meanwhile
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
    return found


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher first, so that it stops nobody gently, and to every rank."""
    ranks = children(process.pid)
    assert len(ranks) == 2, ranks
    for pid in (process.pid, *ranks):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=20)  # ends when the last of them has closed its output


def test_weights_and_moments_are_those_of_the_run_that_was_not_killed(runs):
    last = f"checkpoints/step-{STEPS:08d}"
    assert_same_bits(runs / "killed" / last, runs / "whole" / last)


def test_metrics_are_those_of_the_run_that_was_not_killed(runs):
    lines = lines_without_timings(runs / "killed")
    assert lines == lines_without_timings(runs / "whole")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert sum(line["layers"][0]["not_sampled"] for line in lines if "loss" in line) > 0


def test_retention_is_the_same(runs):
    for run in ("killed", "whole"):
        names = [path.name for path in checkpoint.committed(runs / run)]
        assert names == [f"step-{step:08d}" for step in (16, 20, 24)]
        assert not list((runs / run / "checkpoints").glob("*.partial"))


def test_experts_saved_on_two_ranks_are_evaluated_and_generate_on_one(runs, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    evaluation = lines_without_timings(runs / "killed")[-1]
    assert cli.main(["eval", str(runs / "killed")]) == 0
    out = capsys.readouterr().out
    assert f"step-{STEPS:08d} on held-out text: {evaluation['eval_loss']:.4f} nats" in out
    assert cli.main(["generate", str(runs / "killed"), "--prompt", "tea", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("tea")
