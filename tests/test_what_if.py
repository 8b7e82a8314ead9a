"""`moetrain replay` on whole runs: a trace that moved between ranks, the table, mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from runs import train, train_on, write_config

from moetrain import cli
from moetrain.replay import compare, replay, settings_of
from moetrain.sinks import read_metrics
from moetrain.trace import Trace


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on four ranks, with two micro-batches on each, that was resumed on one
    rank after the second step; both recompute."""
    config = write_config(
        tmp_path_factory.mktemp("moved"),
        moe={"router": "gshard", "drop_policy": "probability", "group": 16},
        train={"steps": 3, "micro_batch": 1},
        eval={"every": 0},
        checkpoint={"every": 2},
        log={"trace": True},
        engine={"activation_checkpointing": "full"},
    )
    run, _ = train_on(4, config, "--parallel.ep", 4)
    assert Trace.open(run).steps == [1, 2, 3]
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    flags = "--train.micro-batch", 4, "--engine.activation-checkpointing", "selective"
    assert train(config, "--train.steps", 4, *flags) == 0
    return run


def ask(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(["replay", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out + err


def test_a_run_that_moved_is_one_trace(moved, capsys):
    trace = Trace.open(moved)
    assert [(record.step, record.world) for record in trace.records()] == [
        (1, 4), (2, 4), (3, 1), (4, 1)
    ]  # fmt: skip
    recorded = replay(trace)
    assert compare(recorded, read_metrics(moved)) == (4, [])
    live = [line for line in read_metrics(moved) if "layers" in line]
    for step, line in zip(recorded.steps, live, strict=True):
        for name, value in step["rates"].items():
            tolerance = 2e-3 if name == "dropped_gate_mass" else 0
            assert value == pytest.approx(line[name], rel=tolerance), name
    code, text = ask(capsys, moved)
    assert code == 0
    assert "every count is that of metrics.jsonl, in 4 steps" in text


def test_every_combination_has_a_row_and_is_in_the_file(moved, capsys, tmp_path):
    flags = ["--capacity-factor", 1.5, "null", "--drop-policy", "position", "random", "--ep", 4]
    code, text = ask(capsys, moved, *flags, "--out", tmp_path / "answers.json")
    assert code == 0
    heading, *rows = text.splitlines()[-6:]
    assert heading.split()[:4] == ["capacity_factor", "drop_policy", "ep", "world"]
    assert [row.split()[:4] for row in rows] == [
        ["1.0", "probability", "1", "1"],
        ["1.5", "position", "4", "4"],
        ["1.5", "random", "4", "4"],
        ["null", "position", "4", "4"],
        ["null", "random", "4", "4"],
    ]
    written = json.loads((tmp_path / "answers.json").read_text())
    trace = Trace.open(moved)
    wanted = settings_of(capacity_factor=(1.5, None), drop_policy=("position", "random"), ep=(4,))
    for answer, theirs in zip(
        [replay(trace), *(replay(trace, setting) for setting in wanted)],
        written["answers"],
        strict=True,
    ):
        assert json.loads(json.dumps(answer._asdict())) == theirs
    assert written["compared"] == {"steps": 4, "differences": []}


def test_what_is_not_the_live_count_is_named(moved, capsys, tmp_path):
    run = Path(shutil.copytree(moved, tmp_path / "run"))
    lines = read_metrics(run)
    lines[1]["layers"][0]["kept_load"][2] += 1
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    code, text = ask(capsys, run)
    assert code == 1
    assert "step 2, layer 0: kept_load is [" in text
    (run / "metrics.jsonl").unlink()
    code, text = ask(capsys, run / "trace")
    assert code == 0
    assert "not compared" in text


MISTAKES = {
    "nothing there": (["{tmp}"], "holds no routing trace; name the folder of a run"),
    "no number": (["{run}", "--ep", "0"], "--ep (0) must be 1 or more"),
    "policy": (["{run}", "--drop-policy", "first"], "position"),
    "setting": (["{run}", "--capacity-factor", "-1"], "moe.capacity_factor (-1.0) must be greater"),
    "file": (["{run}", "--out", "{tmp}/no/x.json"], "cannot be written: No such file"),
}


@pytest.mark.parametrize(("args", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_message(moved, capsys, tmp_path, args, message):
    code, text = ask(capsys, *(arg.format(run=moved, tmp=tmp_path) for arg in args))
    assert code == 2
    assert text.startswith("moetrain: error: ")
    assert message in text
    assert "Traceback" not in text
