"""A run killed for real, and what it is once it has been resumed: the run that was never killed."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_bits, lines_without_timings, without_pictures, write_config

from moetrain import checkpoint, cli, settings
from moetrain.mesh import Mesh
from moetrain.sinks import read_metrics
from moetrain.train import set_up, train

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
    pids = ranks2.run(os.getpid)
    with ThreadPoolExecutor(1) as caller:
        running = caller.submit(ranks2.run, train_on, config, "killed")
        wait_for(lambda: checkpoint.latest(killed) is not None, running)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="killed by SIGKILL"):
            running.result()
    last = read_metrics(killed)[-1]["step"]
    assert EVERY <= last < STEPS, "it was to be killed on the way"
    saved = checkpoint.latest(killed)
    assert saved is not None
    output = ranks2.run(train_on, config, "killed")[0]
    assert re.search(rf"on 2 ranks \(cpu, fp32\), from step {int(saved.name[5:])}\n", output), (
        output
    )
    assert "from the start" in ranks2.run(train_on, config, "whole")[0]
    return config.parent / "runs"


def train_on(config: Path, name: str) -> str:
    """The rest of a run; returns what it says."""
    made = settings.load(config, ["--name", name])
    mesh = Mesh(torch.device("cpu"), made.parallel.ep)
    with without_pictures(), redirect_stdout(StringIO()) as said:
        train(set_up(made, settings.run_directory(made.out, made.name), mesh))
    return said.getvalue()


def wait_for(condition: Callable[[], bool], running: Future[Any], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert not running.done(), running.result()
        assert time.monotonic() < deadline, "no checkpoint yet"
        time.sleep(0.01)


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
