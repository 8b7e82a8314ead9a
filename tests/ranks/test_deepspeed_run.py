"""Whole runs under DeepSpeed, through launcher and command line, on a small local text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import lines_without_timings, train, write_config

from moetrain import cli

ROOT = Path(__file__).parents[2]
STEPS = 8
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 10_000},
    }
    (folder / "ds.json").write_text(json.dumps(given))
    engine = {"kind": "deepspeed", "zero_stage": 2, "deepspeed_config": str(folder / "ds.json")}
    return write_config(folder, engine=engine, parallel={"ep": 2}, train={"steps": STEPS})


def start(config: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """In an empty folder, as a user does."""
    (config.parent / "here").mkdir(exist_ok=True)
    return subprocess.run(
        list(command),
        cwd=config.parent / "here",
        env={
            **{key: value for key, value in os.environ.items() if key not in LAUNCHED},
            **{"NPROC": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            **{"PYTHONPATH": str(ROOT), "VENV": sys.prefix},
        },
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def launched(config: Path) -> str:
    """What two ranks said under the launcher."""
    done = start(config, str(ROOT / "launch/train.sh"), str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_deepspeed_says_nothing_and_leaves_nothing(config: Path, launched: str) -> None:
    """Its log is long and not about the training."""
    assert f"step {STEPS}/{STEPS}" in launched
    for word in ("deepspeed", "INFO", "WARNING", "Warning", "warning", "accelerator"):
        assert word not in launched.replace(str(config.parent), ""), launched
    assert list((config.parent / "here").iterdir()) == []


def test_the_whole_model_is_counted(
    config: Path, launched: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although a rank has half of the experts."""
    assert cli.main(["check", str(config), "--world-size", "2"]) == 0
    report = capsys.readouterr().out.splitlines()
    (line,) = [line for line in report if line.startswith("parameters")]
    assert line.split()[1] in launched


def test_its_losses_are_those_of_the_torch_engine(
    config: Path, launched: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one rank, and from the middle: the torch engine goes on from its checkpoint."""
    flags = ["--engine.kind", "torch", "--parallel.ep", "1", "--name"]
    assert train(config, *flags, "alone") == 0
    runs = config.parent / "runs"
    ours, theirs = (lines_without_timings(runs / name) for name in ("run", "alone"))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & mine.keys():
            assert mine[key] == pytest.approx(other[key], rel=1e-3), (mine["step"], key)
    resumed = str(runs / "run/checkpoints/step-00000006")
    assert train(config, *flags, "on", "--checkpoint.resume", resumed) == 0
    last = lines_without_timings(runs / "on")[-1]
    assert last["eval_loss"] == pytest.approx(ours[-1]["eval_loss"], rel=1e-3)
    capsys.readouterr()


def test_its_checkpoint_is_evaluated_and_generates(
    config: Path, launched: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config.parent / "runs" / "run"
    assert cli.main(["eval", str(run)]) == 0
    loss = lines_without_timings(run)[-1]["eval_loss"]
    assert f"held-out text: {loss:.4f} nats" in capsys.readouterr().out
    assert cli.main(["generate", str(run), "--prompt", "tea", "--max-tokens", "5"]) == 0


TWICE = """
import os, sys
from moetrain import cli, report
report.write_plots = lambda *_: []
config, json = sys.argv[1:]
flags = ["--parallel.ep", "1", "--checkpoint.resume", "auto"]
for steps in (1, 2):
    assert cli.main(["train", config, "--name", "twice", "--train.steps", str(steps), *flags]) == 0
assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & os.environ.keys()
print("deepspeed" in sys.modules)
open(json, "w").write('{"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}')
print(cli.main(["train", config, "--name", "refused", *flags]))
"""


def test_one_process_trains_twice_and_hears_what_deepspeed_refuses(config: Path) -> None:
    """The second run meets what the first left in DeepSpeed's modules."""
    given = config.parent / "ds.json"
    kept = given.read_text()
    done = start(config, sys.executable, "-c", TWICE, str(config), str(given))
    given.write_text(kept)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2:] == ["True", str(cli.BAD_INPUT)]
    assert "engine.deepspeed_config: DeepSpeed refuses: 1 validation error" in done.stderr
    assert "reduce_bucket_size" in done.stderr
    assert "Traceback" not in done.stderr
