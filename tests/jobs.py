"""Whole runs whose ranks are real processes, forks of one that has imported everything.

A rank is what a launcher would start, without the seconds that its imports take: the command line
runs in it with RANK and the rest set, and its store lives in the test, as an agent's would.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from moetrain import torchrun
from moetrain.failure import LAUNCHER
from moetrain.testing.processes import PRELOADED

SECONDS = 60.0


class Ended(NamedTuple):
    """How a job ended."""

    codes: list[int]
    """Exit codes by rank; -9 for one killed by SIGKILL."""
    output: str
    """What all ranks said, on both streams."""
    failures: dict[int, ProcessFailure]
    """What a launcher knows of ranks that ended otherwise than well."""

    @property
    def code(self) -> int:
        """What a launcher makes of it."""
        return torchrun.exit_code(self.failures) if self.failures else 0

    @property
    def last_words(self) -> str:
        """What a launcher says in the end."""
        return torchrun.describe(self.failures)


class Job:
    """The ranks of a run."""

    def __init__(self, processes: list[Any], log: Path) -> None:
        self._processes, self._log = processes, log

    def send(self, number: int, *ranks: int) -> None:
        """A signal to these ranks; to all without any."""
        for rank in ranks or range(len(self._processes)):
            os.kill(self._processes[rank].pid, number)

    def is_alive(self, rank: int) -> bool:
        """Whether a rank still runs."""
        return self._processes[rank].is_alive()

    def said(self) -> str:
        """What has been said so far."""
        return self._log.read_text()

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Return when the condition holds."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"it took too long:\n{self.said()}"
            assert any(process.is_alive() for process in self._processes), self.said()
            time.sleep(0.01)

    def wait_for_word(self, word: str) -> None:
        """Return when some rank has said that."""
        self.wait_for(lambda: word in self.said())

    def wait(self) -> Ended:
        """Return when all ranks have ended by themselves."""
        deadline = time.monotonic() + SECONDS
        for rank, process in enumerate(self._processes):
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"rank {rank} still runs:\n{self.said()}"
        codes = [process.exitcode for process in self._processes]
        failures = {
            rank: ProcessFailure(
                rank, process.pid, process.exitcode, str(error_file(self._log, rank))
            )
            for rank, process in enumerate(self._processes)
            if process.exitcode
        }
        return Ended(codes, self.said(), failures)

    def kill(self) -> None:
        """End what is left."""
        for process in self._processes:
            process.kill()
            process.join()


def _server() -> int:
    """Process id of the server that ranks are forks of, and so their parent."""
    forkserver.ensure_running()
    return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]


def error_file(log: Path, rank: int) -> Path:
    """Where a rank says why it failed."""
    return log.with_name(f"error-{rank}.json")


@contextmanager
def job(
    folder: Path,
    num_ranks: int,
    *command: object,
    namespaces: Sequence[str] = (),
    **variables: str,
) -> Iterator[Job]:
    """`moetrain COMMAND` on ranks of their own; what is left of them ends with the block.

    `variables` are for their environment; FAULT makes a rank go wrong, as `faulty` tells. With
    `namespaces`, each rank is in a network of its own, and rank 0 keeps the store.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "jobs"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    log = folder / "said"
    log.write_text("")
    for rank in range(num_ranks):
        error_file(log, rank).unlink(missing_ok=True)
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": str(not namespaces),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        LAUNCHER: str(_server()),
        **variables,
    }
    processes = [
        context.Process(
            target=_serve,
            args=(
                {
                    **shared,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "TORCHELASTIC_ERROR_FILE": str(error_file(log, rank)),
                },
                namespaces[rank] if namespaces else None,
                log,
                command,
            ),
            daemon=True,
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    running = Job(processes, log)
    try:
        yield running
    finally:
        running.kill()


def _serve(
    variables: dict[str, str], namespace: str | None, log: Path, command: tuple[object, ...]
) -> None:
    """Life of a rank."""
    if namespace is not None:
        _enter(namespace)
    import torch
    from faulty import go_wrong
    from runs import without_pictures

    from moetrain import cli

    os.environ.update(variables)
    for fault in filter(None, variables.get("FAULT", "").split(",")):
        go_wrong(fault)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    torch.set_num_threads(1)
    with without_pictures():
        sys.exit(cli.main([str(word) for word in command]))


def _enter(namespace: str) -> None:
    """Make a network namespace this process's own, before it has other threads."""
    clone_newnet = 0x40000000
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), clone_newnet):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
