"""Signals: one agreed step, saved, exit code 75, and nothing lost."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from jobs import Job, job
from runs import assert_same_bits, lines_without_timings, write_config

from moetrain import checkpoint
from moetrain.sinks import read_metrics

STEPS = 4000
"""More than are ever done."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(
        tmp_path,
        moe={"router": "gshard", "top_k": 2},
        parallel={"ep": 2},
        train={"steps": STEPS},
        eval={"every": 20},
        checkpoint={"every": 1000, "asynchronous": True},
    )


def folder_of(config: Path) -> Path:
    return config.parent / "runs" / "run"


def saved_step(config: Path) -> int:
    path = checkpoint.latest(folder_of(config))
    assert path is not None
    return checkpoint.read_manifest(path).step


def stop(running: Job, number: int, *ranks: int, after: str = "step 3/") -> str:
    running.wait_for_word(after)
    running.send(number, *ranks)
    codes, output = running.wait()
    assert codes == [75] * len(codes), output
    assert "Traceback" not in output
    return output


@pytest.mark.parametrize(
    ("number", "ranks"),
    [(signal.SIGTERM, ()), (signal.SIGINT, (1,)), (signal.SIGUSR1, (0,))],
    ids=["TERM to all", "INT to rank 1", "USR1 to rank 0"],
)
def test_a_signal_saves_the_step_that_all_agree_on(
    config: Path, number: int, ranks: tuple[int, ...]
) -> None:
    with job(config.parent, 2, "train", config) as running:
        output = stop(running, number, *ranks)
    last = read_metrics(folder_of(config))[-1]["step"]
    assert saved_step(config) == last
    assert f"stopped by a signal after step {last} of {STEPS}" in output
