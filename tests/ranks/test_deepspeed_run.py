"""Whole runs under DeepSpeed, on a small local text: by its own launcher on two hosts, which are
this machine twice, with a stub for pdsh; and in one process, through the command line.

The stub does what pdsh does with its arguments, and gives the hosts nothing else: a shell without
this process's variables.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from launchers import ROOT, Stubs, run
from runs import lines_without_timings, train, write_config

from moetrain import cli

STEPS = 8
PDSH = """
hosts="$5"; shift 5
number=0; pids=()
for host in ${hosts//,/ }; do
    command="$*"
    env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${command//%n/$number}" & pids+=($!)
    number=$((number + 1))
done
for pid in "${pids[@]}"; do wait "$pid" || exit; done
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 10_000},
    }
    (folder / "ds.json").write_text(json.dumps(given))
    (folder / "here").mkdir()
    engine = {"kind": "deepspeed", "zero_stage": 2, "deepspeed_config": str(folder / "ds.json")}
    return write_config(folder, engine=engine, parallel={"ep": 2}, train={"steps": STEPS})


# ---- two hosts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(config: Path) -> str:
    """What two ranks and their launchers said."""
    if torch.cuda.is_available():
        pytest.skip("both hosts would take the same GPU")
    folder = config.parent
    stubs = Stubs(folder / "bin")
    stubs.folder.mkdir()
    stubs.add("ssh")
    stubs.add("pdsh", PDSH)
    stubs.add("python")  # for the check before, which a test does here
    (folder / "hostfile").write_text("one slots=1\nother slots=1\n")
    (folder / "variables").write_text("GLOO_SOCKET_IFNAME=lo\nOMP_NUM_THREADS=1\n")
    done = run(
        *(ROOT / "launch/deepspeed.sh", config),
        PATH=f"{stubs.path}:{sys.prefix}/bin",
        VENV=str(folder),
        HOSTFILE=str(folder / "hostfile"),
        DS_ENV_FILE=str(folder / "variables"),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(20000 + os.getpid() % 10000),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (pdsh,) = stubs.calls("pdsh")
    assert pdsh.arguments[4] == "one,other"
    return done.stdout + done.stderr


def test_the_whole_model_is_counted(
    config: Path, launched: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although a rank has half of the experts."""
    assert "on 2 ranks" in launched
    assert cli.main(["check", str(config), "--world-size", "2"]) == 0
    report = capsys.readouterr().out.splitlines()
    (line,) = [line for line in report if line.startswith("parameters")]
    assert line.split()[1] in launched


def test_its_losses_are_those_of_the_torch_engine(config: Path, launched: str) -> None:
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


def test_its_checkpoint_is_evaluated_and_generates(
    config: Path, launched: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config.parent / "runs" / "run"
    assert cli.main(["eval", str(run)]) == 0
    loss = lines_without_timings(run)[-1]["eval_loss"]
    assert f"held-out text: {loss:.4f} nats" in capsys.readouterr().out
    assert cli.main(["generate", str(run), "--prompt", "tea", "--max-tokens", "5"]) == 0


# ---- one process ---------------------------------------------------------------------------------

TWICE = """
import os, sys
from moetrain import cli, report
report.write_plots = lambda *_: []
config, json = sys.argv[1:]
flags = "--parallel.ep 1 --checkpoint.resume auto --train.warmup-steps 0".split()
for steps in (1, 2):
    assert cli.main(["train", config, "--name", "twice", "--train.steps", str(steps), *flags]) == 0
assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & os.environ.keys()
assert "deepspeed" in sys.modules
open(json, "w").write('{"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}')
print("REFUSED", file=sys.stderr)
assert cli.main(["train", config, "--name", "refused", *flags]) == cli.BAD_INPUT
"""


def test_one_process_trains_twice_and_hears_what_deepspeed_refuses(config: Path) -> None:
    """The second run meets what the first left in DeepSpeed's modules. DeepSpeed's own log, which
    is long and not about the training, is not heard, and no file is left where it was started."""
    given, here = config.parent / "ds.json", config.parent / "here"
    kept = given.read_text()
    done = run(sys.executable, "-c", TWICE, config, given, cwd=here, CUDA_VISIBLE_DEVICES="")
    given.write_text(kept)
    said, refusal = done.stderr.split("REFUSED\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    said = (done.stdout + said).replace(str(config.parent), "")
    assert not re.search("deepspeed|INFO|warning|accelerator", said, re.IGNORECASE), said
    assert list(here.iterdir()) == []
    assert "engine.deepspeed_config: DeepSpeed refuses: 1 validation error" in refusal
    assert "reduce_bucket_size" in refusal
    assert "Traceback" not in refusal
