"""Signals at every moment of a run: one agreed step, saved, exit code 75, and nothing lost."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from jobs import Job, job
from runs import assert_same_bits, lines_without_timings, write_config

from moetrain import checkpoint
from moetrain.sinks import read_metrics
from moetrain.stopping import ECHO_S

STEPS = 4000
"""More than are ever done."""
SECTIONS = {
    "moe": {"router": "gshard", "top_k": 2},
    "parallel": {"ep": 2},
    "data": {"eval_fraction": 0.5},
    "train": {"steps": STEPS},
    "eval": {"every": 4, "sequences": 400},
    "checkpoint": {"every": 1000, "keep": 9, "asynchronous": True},
}
EVERYWHERE = ()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, **SECTIONS)


def position(config: Path) -> dict:
    """Where the newest checkpoint stands."""
    path = checkpoint.latest(config.parent / "runs" / "run")
    assert path is not None
    return checkpoint.read_manifest(path).extra["position"]  # type: ignore[return-value]


def end(running: Job) -> str:
    ended = running.wait()
    assert ended.code == 75, ended.output
    assert set(ended.codes) == {75}
    assert "Traceback" not in ended.output
    return ended.output


@pytest.mark.parametrize(
    ("number", "ranks"),
    [(signal.SIGTERM, EVERYWHERE), (signal.SIGINT, (1,)), (signal.SIGUSR1, (0,))],
    ids=["TERM to all", "INT to rank 1", "USR1 to rank 0"],
)
def test_all_ranks_stop_after_the_same_step_and_save_it(
    config: Path, number: int, ranks: tuple[int, ...]
) -> None:
    with job(config.parent, 2, "train", config, "--eval.every", 0) as running:
        running.wait_for_word("step 3/")
        running.send(number, *ranks)
        output = end(running)
    last = read_metrics(config.parent / "runs" / "run")[-1]["step"]
    assert position(config)["step"] == last
    assert not position(config)["owes_evaluation"]
    assert f"stopped by a signal after step {last} of {STEPS}" in output


def test_a_signal_while_a_batch_is_read_is_met_after_its_step(config: Path) -> None:
    with job(config.parent, 2, "train", config, "--eval.every", 0, FAULT="read 1 4") as running:
        running.wait_for_word("reading")
        running.send(signal.SIGTERM, 1)
        end(running)
    assert position(config)["step"] == 4


def test_an_evaluation_that_was_cut_short_is_made_up_for(config: Path) -> None:
    """The run that was stopped in it, and again later, is the one that never was, bit by bit."""
    flags = ("--train.steps", 7)
    with job(config.parent, 2, "train", config, *flags) as running:
        running.wait_for_word("step 4/")
        running.send(signal.SIGTERM)
        end(running)
    assert position(config) | {"step": 4, "owes_evaluation": True} == position(config)
    with job(config.parent, 2, "train", config, *flags) as running:
        running.wait_for_word("step 5/")
        running.send(signal.SIGTERM, 1)
        end(running)
    assert position(config)["step"] in (5, 6)
    for name in ("run", "whole"):
        with job(config.parent, 2, "train", config, *flags, "--name", name) as running:
            assert running.wait().codes == [0, 0]
    run, whole = (config.parent / "runs" / name for name in ("run", "whole"))
    assert lines_without_timings(run) == lines_without_timings(whole)
    assert [line["step"] for line in read_metrics(run) if "eval_loss" in line] == [4, 7]
    last = "checkpoints/step-00000007"
    assert_same_bits(run / last, whole / last)


def test_a_signal_during_a_save_lets_it_finish(config: Path) -> None:
    folder = config.parent / "runs" / "run" / "checkpoints"
    with job(config.parent, 2, "train", config, "--checkpoint.every", 1) as running:
        running.wait_for(lambda: list(folder.glob("*.partial")))
        running.send(signal.SIGTERM)
        output = end(running)
    assert not list(folder.glob("*.partial"))
    steps = [checkpoint.read_manifest(path).step for path in checkpoint.committed(folder.parent)]
    assert f"stopped by a signal after step {steps[-1]} of" in output
    assert steps == list(range(1, steps[-1] + 1))


def test_before_the_first_step_there_is_nothing_to_wait_for(config: Path) -> None:
    for number in range(200):  # so that reading it takes a while
        (config.parent / "text" / f"more-{number}.txt").write_text("words " * 50_000)
    with job(config.parent, 2, "train", config) as running:
        running.wait_for(lambda: (config.parent / "cache").exists())
        running.send(signal.SIGTERM)
        assert "stopped by SIGTERM before the first step" in end(running)
    assert checkpoint.latest(config.parent / "runs" / "run") is None


def test_a_run_that_never_saves_ends_as_programs_do(config: Path) -> None:
    with job(config.parent, 2, "train", config, "--checkpoint.every", 0) as running:
        running.wait_for_word("step 3/")
        running.send(signal.SIGINT)
        assert running.wait().codes == [130, 130]
    assert checkpoint.latest(config.parent / "runs" / "run") is None


def test_a_second_signal_ends_the_run_at_once(config: Path) -> None:
    """Even while the main thread waits in a collective for a rank that does not come."""
    with job(config.parent, 2, "train", config, "--eval.every", 0) as running:
        running.wait_for_word("step 3/")
        running.send(signal.SIGSTOP, 1)
        running.send(signal.SIGTERM, 0)
        running.send(signal.SIGTERM, 0)  # at once: an echo of the first
        running.wait_for_word("stopping after this step")
        time.sleep(ECHO_S + 0.2)
        assert running.is_alive(0)
        running.send(signal.SIGTERM, 0)
        running.wait_for_word("ended at once by a second signal, SIGTERM")
        running.send(signal.SIGKILL, 1)
        assert running.wait().codes == [128 + signal.SIGTERM, -signal.SIGKILL]
