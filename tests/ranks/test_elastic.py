"""The elastic agent: ranks that are lost are started again, here or on the nodes that are left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
PATIENCE_S = 4 * SECONDS
"""For processes that import everything anew, on cores that others use, too."""


class Agent:
    """A launcher, its ranks and what they say."""

    def __init__(self, log: Path, *command: str, **variables: str) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, pattern: str, after: int = 0) -> re.Match[str]:
        """The first place behind one in the log where it says so, once it does."""

        def found() -> re.Match[str] | None:
            return re.compile(pattern).search(self.log.read_text(), after)

        self.wait_until(lambda: found() is not None)
        match = found()
        assert match
        return match

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds, unless the launcher has ended."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def command(self) -> list[str]:
        """What it runs now."""
        words = Path(f"/proc/{self.process.pid}/cmdline").read_text().split("\0")
        return [sys.executable, *words[1:-1]]

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


def free_port() -> int:
    """One of this host where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


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
    settings = ("--parallel.ep", "2", "--checkpoint.grace-s", "0.001")
    command = ("launch/train.sh", str(config), *settings)
    agent = Agent(tmp_path / "said", *command, NPROC="2")
    with agents(agent):
        agent.wait_for(r"step 3/")
        agent.wait_for(r"warning: a stop may take \S+ s, for a step \(\S+ s\) and two saves")
        os.kill(agent.rank(1), signal.SIGKILL)
        agent.wait_for(r"error: rank 1 on \S+: killed by SIGKILL\nmoetrain: starting all ranks")
        start = int(agent.wait_for(r"on 2 ranks \(cpu, fp32\), from step (\d+)")[1])
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
        assert agent.process.wait(PATIENCE_S) == 0


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


def test_nodes_come_and_go(tmp_path: Path) -> None:
    """Two agents with a rank each: one comes later, dies with its rank, and another comes.

    They share a log: rank 0, which speaks, is with the agent whose process has the lowest number.
    """
    config, log = write(tmp_path), tmp_path / "log"
    port = free_port()
    command = ("launch/train.sh", str(config))
    variables = {
        **{"NNODES": "1:2", "NPROC": "1", "MAX_RESTARTS": "3"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"},
        # Torchrun's own, for agents to notice sooner that one has come or gone. One that is silent
        # for so long is given up, which must not happen to an agent that is short of time.
        "PET_RDZV_CONF": "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=15",
    }
    first = Agent(log, *command, **variables)
    with agents(first):
        first.wait_for("step 2/")
        command = first.command()  # what the script has become, without its checks
        second = Agent(log, *command, **variables)
        with agents(second):
            where = int(first.wait_for(r"stopped by a signal after step (\d+)")[1])
            joined = first.wait_for(rf"on 2 ranks \(cpu, fp32\), from step {where}\n")
            first.wait_for(f"step {where + 5}/{STEPS}")
        # `second` is gone
        alone = first.wait_for(r"on 1 rank \(cpu, fp32\), from step (\d+)", joined.end())
        assert int(alone[1]) > where
        again = Agent(log, *command, **variables)
        with agents(again):
            stop = first.wait_for(r"stopped by a signal after step (\d+)", alone.end())
            where = int(stop[1])
            first.wait_for(rf"on 2 ranks \(cpu, fp32\), from step {where}\n", stop.end())
            first.wait_for(f"step {where + 3}/{STEPS}")
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
    where = f"127.0.0.1:{free_port()}"
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
