"""Ranks that stop, loop, raise or die: every other ends in bounded time, and says which it was."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest
from jobs import job
from runs import write_config

from moetrain import checkpoint
from moetrain.watchdog import STACKS_FILE

LIMIT_S = 3
FLAGS = ("--parallel.timeout-s", LIMIT_S, "--eval.every", 0, "--checkpoint.every", 2)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("hangs"), parallel={"ep": 2}, train={"steps": 4000})


def stacks(config: Path, name: str) -> dict[int, str]:
    """What is written of each rank."""
    text = (config.parent / "runs" / name / STACKS_FILE).read_text()
    parts = text.split("\nrank ")[1:]
    return {int(part[0]): part for part in parts}


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_the_others_end(config: Path, stopped: int) -> None:
    name = f"stopped-{stopped}"
    with job(config.parent, 2, "train", config, *FLAGS, "--name", name) as running:
        running.wait_for_word("step 3/")
        running.send(signal.SIGSTOP, stopped)
        running.wait_for(lambda: not running.is_alive(1 - stopped))
        running.send(signal.SIGKILL, stopped)
        ended = running.wait()
    assert (ended.code, ended.codes[1 - stopped]) == (1, 1)
    assert ended.last_words.startswith(f"moetrain: error: rank {stopped} (last at: ")
    assert "no sign of life (stopped, or its host is gone)" in ended.last_words
    assert ended.last_words.endswith(f"runs/{name}/{STACKS_FILE}")
    found = stacks(config, name)
    assert set(found) == {0, 1}
    assert all("moetrain/train.py" in stack for stack in found.values()), "also of the stopped one"


def test_where_the_stopped_rank_holds_the_store_the_others_say_so_and_where_they_stand(
    config: Path,
) -> None:
    """As it does where nodes come and go: nothing can be told through it any more."""
    flags = (*FLAGS, "--name", "holder")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    with job(config.parent, 2, "train", config, *flags, **variables) as running:
        running.wait_for_word("step 3/")
        running.send(signal.SIGSTOP, 0)
        running.wait_for(lambda: not running.is_alive(1))
        running.send(signal.SIGKILL, 0)
        ended = running.wait()
    assert (ended.code, ended.codes[1]) == (1, 1)
    assert "rank 1 has had no answer from the store of the run" in ended.last_words
    assert "rank 0, which holds it, is gone or stopped" in ended.last_words
    text = (config.parent / "runs" / "holder" / "stacks-1.txt").read_text()
    assert "moetrain/train.py" in text


def test_a_rank_that_loops_is_behind_the_others(config: Path) -> None:
    flags = (*FLAGS, "--name", "loops")
    with job(config.parent, 2, "train", config, *flags, FAULT="loop 1 4") as running:
        ended = running.wait()
    assert (ended.code, ended.codes) == (1, [1, 1])
    assert ended.last_words.startswith(
        "moetrain: error: rank 1 (step 4) lags behind the others, after "
    )
    found = stacks(config, "loops")
    assert "_go_wrong" in found[1]
    assert "_go_wrong" not in found[0]


def test_when_a_rank_raises_the_others_end_and_its_error_comes_last(config: Path) -> None:
    flags = (*FLAGS, "--name", "raises")
    with job(config.parent, 2, "train", config, *flags, FAULT="raise 1 4") as running:
        ended = running.wait()
    assert (ended.code, ended.codes) == (1, [1, 1])
    assert ended.last_words.startswith("moetrain: error: the first error, of rank 1 on ")
    assert ended.last_words.endswith("\nRuntimeError: the cause of it all")
    assert ended.output.count("Traceback") == 1, "what follows from it has none"
    assert "moetrain: rank 0: lost another rank: " in ended.output


def test_when_a_rank_is_killed_the_others_end(config: Path) -> None:
    flags = (*FLAGS, "--name", "killed")
    with job(config.parent, 2, "train", config, *flags, FAULT="kill 0 4") as running:
        ended = running.wait()
    assert (ended.code, ended.codes) == (1, [-signal.SIGKILL, 1])
    assert ended.last_words.startswith("moetrain: error: rank 0 on ")
    assert ended.last_words.endswith(": killed by SIGKILL")
    assert checkpoint.latest(config.parent / "runs" / "killed") is not None
