"""The elastic agent: ranks that are lost are started again, here or on the nodes that are left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from jobs import SECONDS
from launchers import ROOT, environment
from runs import write_config

from moetrain import checkpoint
from moetrain.sinks import read_metrics

STEPS = 4000
"""More than are ever done."""


class Agent:
    """A launcher, its ranks and what they say."""

    def __init__(self, log: Path, *command: str, **variables: str) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first place where it says so, once it does."""
        deadline = time.monotonic() + 2 * SECONDS
        while (found := re.search(pattern, self.log.read_text())) is None:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return found

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        for pid in Path(children).read_text().split():
            if f"\0RANK={number}\0" in Path(f"/proc/{pid}/environ").read_text():
                return int(pid)
        raise AssertionError(f"no rank {number}: {self.log.read_text()}")

    def end(self, number: int) -> int:
        """Send it a signal; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)

    def kill(self) -> None:
        """End it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def agents(*made: Agent) -> Iterator[None]:
    try:
        yield
    finally:
        for agent in made:
            agent.kill()


def free_endpoint() -> str:
    """Host and port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return "{}:{}".format(*free.getsockname())


def write(folder: Path) -> Path:
    return write_config(
        folder,
        parallel={"ep": 1, "timeout_s": 30},
        train={"steps": STEPS},
        eval={"every": 0},
        checkpoint={"every": 2, "asynchronous": True},
    )


def test_ranks_that_are_lost_start_again_from_the_last_checkpoint(tmp_path: Path) -> None:
    """And the signal that the agent is sent reaches them, and their exit code the caller."""
    config = write(tmp_path)
    command = ("launch/train.sh", str(config), "--parallel.ep", "2")
    agent = Agent(tmp_path / "said", *command, NPROC="2")
    with agents(agent):
        agent.wait_for(r"step 3/")
        os.kill(agent.rank(1), signal.SIGKILL)
        agent.wait_for(r"error: rank 1 on \S+: killed by SIGKILL\nmoetrain: starting all ranks")
        start = int(agent.wait_for(r"on 2 ranks \(cpu\), from step (\d+)")[1])
        assert start >= 2
        agent.wait_for(f"step {start + 9}/{STEPS}")
        assert agent.end(signal.SIGTERM) == 75
    last = checkpoint.latest(tmp_path / "runs/run")
    assert last is not None
    lines = [line["step"] for line in read_metrics(tmp_path / "runs/run")]
    assert lines == list(range(1, checkpoint.read_manifest(last).step + 1))


def test_a_rank_that_is_lost_in_start_up_is_no_stop(tmp_path: Path) -> None:
    """The agent ends the other one before its first step, and starts both again."""
    agent = Agent(
        tmp_path / "said",
        *(sys.executable, "-m", "moetrain.torchrun", "--nproc-per-node=2", "--max-restarts=1"),
        *("tests/faulty.py", "train", str(write(tmp_path)), "--train.steps", "2"),
        FAULT="kill 1 0,loop 0 0",
    )
    with agents(agent):
        agent.wait_for(r"error: rank 1 on \S+: killed by SIGKILL\nmoetrain: starting all ranks")
        assert agent.process.wait(2 * SECONDS) == 0


def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    agent = Agent(
        tmp_path / "said",
        *(sys.executable, "-m", "moetrain.torchrun", "--nproc-per-node=1"),
        *("-m", "moetrain", "train", str(write(tmp_path))),
    )
    with agents(agent):
        agent.wait_for("step 1/")
        rank = Path(f"/proc/{agent.rank(0)}")
        agent.process.kill()
        deadline = time.monotonic() + SECONDS
        while rank.exists() and ") Z" not in (rank / "stat").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_when_a_node_is_lost_the_others_go_on_and_it_may_come_back(tmp_path: Path) -> None:
    """Two agents with a rank each; one dies with its rank, and the world is half as large."""
    config = write(tmp_path)
    meeting = (
        *("--nproc-per-node=1", "--nnodes=1:2", "--max-restarts=3", "--rdzv-backend=c10d"),
        *(f"--rdzv-endpoint={free_endpoint()}", "--rdzv-id=test"),
        "--rdzv-conf=last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=6",
    )
    command = (sys.executable, "-m", "moetrain.torchrun", *meeting)
    train = ("-m", "moetrain", "train", str(config))
    variables = {"GLOO_SOCKET_IFNAME": "lo"}
    first = Agent(tmp_path / "first", *command, *train, **variables)
    with agents(first):
        time.sleep(1)  # the first to come keeps the store
        second = Agent(tmp_path / "second", *command, *train, **variables)
        with agents(second):
            said = first if first.process.poll() is None else second
            deadline = time.monotonic() + 2 * SECONDS
            while checkpoint.latest(tmp_path / "runs/run") is None:
                assert time.monotonic() < deadline, said.log.read_text()
                time.sleep(0.05)
        # `second` is gone
        first.wait_for(r"moetrain: starting all ranks again")
        start = int(first.wait_for(r"on 1 rank \(cpu\), from step (\d+)")[1])
        assert start >= 2
        first.wait_for(f"step {start + 5}/{STEPS}")
        again = Agent(tmp_path / "again", *command, *train, **variables)
        with agents(again):
            where = first.wait_for(r"stopped by a signal after step (\d+)")[1]
            first.wait_for(rf"on 2 ranks \(cpu\), from step {where}\n[^§]*step {int(where) + 3}/")
            again.process.send_signal(signal.SIGSTOP)
            assert first.end(signal.SIGTERM) == 75  # and with it the store
            assert again.end(signal.SIGCONT) == 75
    lines = [line["step"] for line in read_metrics(tmp_path / "runs/run")]
    assert lines == list(range(1, len(lines) + 1))


def test_a_run_that_never_saves_is_not_started_again_when_it_was_asked_to_stop(
    tmp_path: Path,
) -> None:
    agent = Agent(
        tmp_path / "said",
        *(sys.executable, "-m", "moetrain.torchrun", "--nproc-per-node=1", "--max-restarts=1"),
        *("-m", "moetrain", "train", str(write(tmp_path)), "--checkpoint.every", "0"),
    )
    with agents(agent):
        agent.wait_for("step 3/")
        assert agent.end(signal.SIGTERM) == 128 + signal.SIGTERM
        assert "starting all ranks again" not in agent.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_agent_that_is_asked_before_its_ranks_are_ready_ends(
    tmp_path: Path, number: int
) -> None:
    config = write(tmp_path)
    agent = Agent(
        tmp_path / "said",
        *(sys.executable, "-m", "moetrain.torchrun", "--nproc-per-node=1"),
        *("-m", "moetrain", "train", str(config)),
    )
    with agents(agent):
        deadline = time.monotonic() + SECONDS
        while not Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert agent.end(number) == 75, agent.log.read_text()
    assert not (tmp_path / "runs").exists()


def test_agents_that_do_not_find_each_other_say_where_they_looked(tmp_path: Path) -> None:
    where = free_endpoint()
    agent = Agent(
        tmp_path / "said",
        *(sys.executable, "-m", "moetrain.torchrun", "--nproc-per-node=1", "--nnodes=2"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={where}", "--rdzv-conf=join_timeout=1"),
        *("-m", "moetrain", "train", str(write(tmp_path))),
    )
    with agents(agent):
        assert agent.process.wait(SECONDS) == 1
        *_, said = agent.log.read_text().splitlines()
    reason = "not all came in time"
    assert said == f"moetrain: error: the agents of this run cannot meet at {where}: {reason}"
