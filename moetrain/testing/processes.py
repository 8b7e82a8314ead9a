"""Ranks as processes of one Gloo group."""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, final

import torch
import torch.distributed as dist

from moetrain.testing.report import (
    DEFAULT_TIMEOUT,
    STOP_SECONDS,
    require_ranks,
    stuck_message,
)

PRELOADED = ("moetrain.testing", "moetrain.train")
"""What the server imports that ranks are forks of."""
DEATH_SECONDS = 0.3
"""How long a rank's exception waits for the death of a rank that would explain it."""
STACK_SECONDS = 0.5
"""How long stuck processes have to write where they stand."""


def run_ranks(
    num_ranks: int, fn: Callable[..., Any], *args: Any, timeout: float = DEFAULT_TIMEOUT
) -> list[Any]:
    """Run `fn(*args)` once per rank, each rank a process of one Gloo group on this machine.

    The first call in a program starts a server that imports torch and moetrain (a few seconds);
    every rank after that is a fork of it. Ranks have one compute thread and the caller's
    environment, and Gloo is bound to loopback. A script that calls this needs
    `if __name__ == "__main__":`.

    Args:
        num_ranks: World size, at least 1.
        fn: A function that another process can import: at the top level of a module.
        args: Picklable arguments; tensors are copied.
        timeout: Seconds until the ranks that still run are reported as stuck.

    Returns:
        What each rank returned, in rank order. It must be picklable.

    Raises:
        Exception: The first failing rank's exception, with its rank and traceback as a note.
        RuntimeError: When a rank's process died: its rank and exit code or signal.
        TimeoutError: Naming the stuck ranks and where they stand.
    """
    with RankPool(num_ranks) as pool:
        return pool.run(fn, *args, timeout=timeout)


class _Worker(NamedTuple):
    """One rank, seen from the caller."""

    rank: int
    process: Any
    connection: Connection
    stack_file: Path


@final
class RankPool:
    """Rank processes that stay alive between calls, so that imports and groups are paid for once.

    Use it as a context manager. What a call leaves behind in the processes (groups, modules,
    environment) the next call finds; after a failed call, and by `renew`, they are replaced by new
    ones.
    """

    def __init__(self, num_ranks: int) -> None:
        require_ranks(num_ranks)
        self.num_ranks = num_ranks
        self._workers: list[_Worker] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        """Start the processes."""
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the processes."""
        self._stop()

    def run(
        self, fn: Callable[..., Any], *args: Any, timeout: float = DEFAULT_TIMEOUT
    ) -> list[Any]:
        """Run `fn(*args)` on every rank; like `run_ranks`."""
        call = pickle.dumps((fn, args))
        if not self._workers:
            self._start()
        try:
            for worker in self._workers:
                # A rank that is already dead is reported, with the rest, by _collect.
                with suppress(OSError):
                    worker.connection.send_bytes(call)
            return self._collect(timeout)
        except BaseException:
            self._stop()
            raise

    def renew(self) -> None:
        """Replace the processes, and all that calls have left behind in them."""
        self._stop()
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            stack_file = Path(self._directory.name, f"stack-{rank}")
            store_stem = str(Path(self._directory.name, "store"))
            process = context.Process(
                target=_serve,
                args=(rank, self.num_ranks, theirs, store_stem, stack_file, dict(os.environ)),
                name=f"rank{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._workers.append(_Worker(rank, process, ours, stack_file))

    def _stop(self) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.join()
            worker.process.close()
        self._workers = []
        if self._directory:
            self._directory.cleanup()
            self._directory = None

    def _collect(self, timeout: float) -> list[Any]:
        """Wait for every rank's answer; raise for the first that failed."""
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < self.num_ranks:
            waiting = [worker for worker in self._workers if worker.rank not in results]
            handles = [handle for w in waiting for handle in (w.connection, w.process.sentinel)]
            ready = wait(handles, max(0.0, deadline - time.monotonic()))
            if not ready:
                stuck = _process_stacks(waiting)
                raise TimeoutError(stuck_message(stuck, self.num_ranks, timeout))
            for worker in waiting:
                if worker.connection in ready or worker.process.sentinel in ready:
                    results[worker.rank] = self._result(worker)
        return [results[rank] for rank in range(self.num_ranks)]

    def _result(self, worker: _Worker) -> Any:
        """What this rank returned; its exception or its death raised."""
        try:
            result, error = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            worker.process.join(STOP_SECONDS)
            result, error = None, RuntimeError(f"rank {worker.rank} closed its connection")
        if error is not None:
            # Peers of a rank that dies fail too, and may be heard of before it.
            self._raise_deaths()
            raise error
        return result

    def _raise_deaths(self) -> None:
        """Raise if a process has ended, or does so in a moment."""
        wait([worker.process.sentinel for worker in self._workers], DEATH_SECONDS)
        dead = [worker for worker in self._workers if worker.process.exitcode is not None]
        if dead:
            causes = ", ".join(f"rank {w.rank}: {_cause(w.process.exitcode)}" for w in dead)
            raise RuntimeError(f"of {self.num_ranks} ranks these died: {causes}")


def _cause(exitcode: int) -> str:
    """An exit code of `multiprocessing` in words."""
    return (
        f"exit code {exitcode}" if exitcode >= 0 else f"killed by {signal.Signals(-exitcode).name}"
    )


def _process_stacks(workers: Sequence[_Worker]) -> dict[int, str]:
    """Where the ranks stand, as their own fault handlers tell."""
    started = [worker for worker in workers if worker.stack_file.exists()]
    for worker in started:
        os.kill(worker.process.pid, signal.SIGUSR1)
    time.sleep(STACK_SECONDS)
    texts = {worker.rank: worker.stack_file.read_text() for worker in started}
    return {
        w.rank: texts.get(w.rank) or "  no answer: stopped, or not yet started\n" for w in workers
    }


def _serve(
    rank: int,
    num_ranks: int,
    connection: Connection,
    store_stem: str,
    stack_file: Path,
    environ: dict[str, str],
) -> None:
    """Life of one process: answer calls until the caller closes the pipe or is gone."""
    os.environ.clear()
    os.environ.update(environ, GLOO_SOCKET_IFNAME="lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    with stack_file.open("w") as stacks, suppress(EOFError, KeyboardInterrupt):
        faulthandler.register(signal.SIGUSR1, file=stacks)
        for number in itertools.count():
            call = connection.recv_bytes()
            store = dist.FileStore(f"{store_stem}-{number}", num_ranks)
            connection.send_bytes(_answer(call, rank, num_ranks, store))


def _answer(call: bytes, rank: int, num_ranks: int, store: dist.Store) -> bytes:
    """The pickled pair (result, None) or (None, exception) of one call."""
    try:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        fn, args = pickle.loads(call)
        return pickle.dumps((fn(*args), None))
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        portable = _portable(error)
        portable.add_note(f"raised by rank {rank} of {num_ranks}:\n{text}")
        return pickle.dumps((None, portable))


def _portable(error: BaseException) -> BaseException:
    """The exception itself where it survives pickling, else a RuntimeError that quotes it."""
    with suppress(Exception):
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error):
            return copy
    return RuntimeError(f"{type(error).__name__}: {error}")
