"""Run distributed code on CPU, in tests of this project and of yours.

- `simulate_ranks` runs every rank as a thread of this process: hundreds of ranks in a second, with
  real collectives and gradients through them. Use it for anything that is about *what* is computed.
- `run_ranks` and `RankPool` run every rank as a process joined by Gloo over loopback. Use them for
  what threads share: crashes, signals, files, environment, per-process state.

Both give `fn` an initialised default process group, return the results in rank order, re-raise the
first failing rank's exception with its rank named, and turn a deadlock into an error that shows
where each stuck rank stands.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, final

import torch
import torch.distributed as dist

__all__ = ["RankPool", "run_ranks", "simulate_ranks"]

DEFAULT_TIMEOUT = 60.0
STOP_SECONDS = 5.0
"""How long ranks have to end when the call is over."""
DEATH_SECONDS = 0.3
"""How long a rank's exception waits for the death of a rank that would explain it."""
STACK_SECONDS = 0.5
"""How long stuck processes have to write where they stand."""


# ---- threads ------------------------------------------------------------------------------------


def simulate_ranks(
    num_ranks: int, fn: Callable[..., Any], *args: Any, timeout: float = DEFAULT_TIMEOUT
) -> list[Any]:
    """Run `fn(*args)` once per rank, each rank a thread with its own default process group.

    FSDP2, DTensor, DeviceMesh with several axes, and functional collectives with their gradients
    work inside; point-to-point sends do not exist, and an all-to-all of split sizes that do not
    match may pass unnoticed (Gloo refuses it). What a process shares, the ranks share: environment,
    default dtype, torch's global generator (draw from a generator of your own) and `args`
    themselves (do not write to them).

    Args:
        num_ranks: World size, at least 1.
        fn: Any callable, closures included.
        timeout: Seconds until the ranks that still run are reported as stuck.

    Returns:
        What each rank returned, in rank order.

    Raises:
        Exception: The first failing rank's own exception, with a note naming the rank.
        TimeoutError: Naming the stuck ranks and where they stand.
        RuntimeError: When called from inside a simulated rank.
    """
    _require_ranks(num_ranks)
    with _threaded_backend() as group_class:
        return _Simulation(num_ranks, lambda: fn(*args), group_class).run(timeout)


_simulating = threading.Lock()


@contextmanager
def _threaded_backend() -> Iterator[Any]:
    """Make process groups a thread's own, and put everything back.

    torch has no public in-process group. The one that it tests itself with is private, so it is
    used here and nowhere else. Isolation mode gives functional collectives, which look groups up
    by name, a registry per thread.
    """
    from torch._C._distributed_c10d import (
        _set_thread_isolation_mode,  # pyright: ignore[reportAttributeAccessIssue]
    )
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    if not _simulating.acquire(blocking=False):
        raise RuntimeError("simulate_ranks does not nest, nor run in two threads at once")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    threaded._install_threaded_pg()
    _set_thread_isolation_mode(True)
    try:
        threaded.ProcessLocalGroup.reset()
        yield threaded.ProcessLocalGroup
    finally:
        threaded.ProcessLocalGroup.reset()
        _set_thread_isolation_mode(False)
        threaded._uninstall_threaded_pg()
        torch.set_num_threads(num_threads)
        _simulating.release()


@final
class _Simulation:
    """One call of `simulate_ranks`: its threads, their results, and the first failure."""

    def __init__(self, num_ranks: int, body: Callable[[], Any], group_class: Any) -> None:
        self.num_ranks = num_ranks
        self.body = body
        self.group_class = group_class
        self.store = _ThreadStore()
        self.results: list[Any] = [None] * num_ranks
        self.failure: tuple[int, BaseException] | None = None
        self.running = set(range(num_ranks))
        self.changed = threading.Condition()
        self.threads = [
            threading.Thread(target=self._rank, args=(rank,), name=f"rank{rank}", daemon=True)
            for rank in range(num_ranks)
        ]

    def run(self, timeout: float) -> list[Any]:
        """Start every rank, wait for the last one or the first failure, and report."""
        for thread in self.threads:
            thread.start()
        try:
            with self.changed:
                self.changed.wait_for(lambda: self.failure or not self.running, timeout)
                failure, stuck = self.failure, self._stacks()
        finally:
            self._stop()
        if failure:
            rank, error = failure
            error.add_note(f"raised by simulated rank {rank} of {self.num_ranks}")
            raise error
        if stuck:
            raise TimeoutError(_stuck_message(stuck, self.num_ranks, timeout))
        return self.results

    def _rank(self, rank: int) -> None:
        """Life of one rank."""
        failure = None
        try:
            dist.init_process_group(
                "threaded", rank=rank, world_size=self.num_ranks, store=self.store
            )
            self.results[rank] = self.body()
        except BaseException as error:
            failure = rank, error
        with self.changed:
            self.failure = self.failure or failure
            self.running.discard(rank)
            self.changed.notify()

    def _stacks(self) -> dict[int, str]:
        """Where each rank that still runs stands."""
        frames = sys._current_frames()
        found = {rank: frames.get(self.threads[rank].ident or 0) for rank in self.running}
        return {
            rank: "".join(traceback.format_stack(frame)) for rank, frame in found.items() if frame
        }

    def _stop(self) -> None:
        """Wake the ranks that wait for one that will not come; force those that compute."""
        deadline = time.monotonic() + STOP_SECONDS
        forced = False
        while any(thread.is_alive() for thread in self.threads) and time.monotonic() < deadline:
            self.store.abort()
            # A group made while this walks over the groups is woken in the next round.
            with suppress(RuntimeError):
                self.group_class.exception_handle(None)
            if not forced and time.monotonic() > deadline - STOP_SECONDS / 2:
                forced = True
                for thread in self.threads:
                    _raise_in(thread, SystemExit)
            for thread in self.threads:
                thread.join(0.05 / self.num_ranks)


def _raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise `error` in another thread, at its next Python instruction."""
    if thread.is_alive() and thread.ident:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(error)
        )


@final
class _ThreadStore(dist.Store):
    """The key-value store through which simulated ranks form groups.

    Unlike `dist.HashStore`, a rank that waits in it can be woken when another rank has failed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()
        self.aborted = False

    def set(self, key: str, value: bytes) -> None:
        """Store a value and wake who waits for it."""
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        """Wait for a value."""
        self.wait([key])
        return self.values[key]

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which starts at 0, and return its new value."""
        with self.changed:
            total = int(self.values.get(key, b"0")) + amount
            self.values[key] = str(total).encode()
            self.changed.notify_all()
            return total

    def check(self, keys: list[str]) -> bool:
        """Tell whether every key has a value."""
        return all(key in self.values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until every key has a value."""
        seconds = timeout.total_seconds() if timeout else None
        with self.changed:
            present = self.changed.wait_for(lambda: self.aborted or self.check(keys), seconds)
        if self.aborted:
            raise SystemExit("another rank has failed")
        if not present:
            raise dist.DistStoreError(f"no value for {keys} after {seconds} s")

    def abort(self) -> None:
        """Make every present and future wait end."""
        with self.changed:
            self.aborted = True
            self.changed.notify_all()


# ---- processes ----------------------------------------------------------------------------------


def run_ranks(
    num_ranks: int, fn: Callable[..., Any], *args: Any, timeout: float = DEFAULT_TIMEOUT
) -> list[Any]:
    """Run `fn(*args)` once per rank, each rank a process of one Gloo group on this machine.

    The first call in a program starts a server that imports torch (a second or more); every rank
    after that is a fork of it. Ranks have one compute thread and the caller's environment, and
    Gloo is bound to loopback. A script that calls this needs `if __name__ == "__main__":`.

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


@final
class RankPool:
    """Rank processes that stay alive between calls, so that imports and groups are paid for once.

    Use it as a context manager. What a call leaves behind in the processes (groups, modules,
    environment) the next call finds; after a failed call they are replaced by new ones.
    """

    def __init__(self, num_ranks: int) -> None:
        _require_ranks(num_ranks)
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
        done = False
        try:
            for worker in self._workers:
                # A rank that is already dead is reported, with the rest, by _collect.
                with suppress(OSError):
                    worker.connection.send_bytes(call)
            results = self._collect(timeout)
            done = True
            return results
        finally:
            if not done:
                self._stop()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "moetrain.testing"])
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.num_ranks, self._directory.name, theirs, dict(os.environ)),
                name=f"rank{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._workers.append(_Worker(rank, process, ours))

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
                stuck = _process_stacks(waiting, Path(self._directory_name()))
                raise TimeoutError(_stuck_message(stuck, self.num_ranks, timeout))
            for worker in waiting:
                if worker.connection in ready or worker.process.sentinel in ready:
                    results[worker.rank] = self._result(worker)
        return [results[rank] for rank in range(self.num_ranks)]

    def _result(self, worker: _Worker) -> Any:
        """What this rank returned; its exception or its death raised."""
        result, error = None, None
        try:
            result, error = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            worker.process.join(STOP_SECONDS)
            self._raise_deaths(0.0)
        if error is not None:
            # Peers of a rank that dies fail too, and may be heard of before it.
            self._raise_deaths(DEATH_SECONDS)
            raise error
        return result

    def _raise_deaths(self, seconds: float) -> None:
        """Wait so long for a process to end, and raise if any has."""
        wait([worker.process.sentinel for worker in self._workers], seconds)
        dead = [worker for worker in self._workers if worker.process.exitcode is not None]
        if dead:
            causes = ", ".join(f"rank {w.rank}: {_cause(w.process.exitcode)}" for w in dead)
            raise RuntimeError(f"of {self.num_ranks} ranks these died: {causes}")

    def _directory_name(self) -> str:
        assert self._directory is not None, "the pool is not started"
        return self._directory.name


def _cause(exitcode: int) -> str:
    """An exit code of `multiprocessing` in words."""
    return (
        f"exit code {exitcode}" if exitcode >= 0 else f"killed by {signal.Signals(-exitcode).name}"
    )


def _process_stacks(workers: Sequence[_Worker], directory: Path) -> dict[int, str]:
    """Where the ranks stand, as their own fault handlers tell."""
    for worker in workers:
        os.kill(worker.process.pid, signal.SIGUSR1)
    time.sleep(STACK_SECONDS)
    texts = {worker.rank: _stack_file(directory, worker.rank).read_text() for worker in workers}
    return {rank: text or "  no answer: the process is stopped\n" for rank, text in texts.items()}


def _stack_file(directory: Path, rank: int) -> Path:
    return directory / f"stack-{rank}"


def _serve(
    rank: int, num_ranks: int, directory: str, connection: Connection, environ: dict[str, str]
) -> None:
    """Life of one process: answer calls until the caller closes the pipe or is gone."""
    os.environ.clear()
    os.environ.update(environ, GLOO_SOCKET_IFNAME="lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    with (
        _stack_file(Path(directory), rank).open("w") as stack_file,
        suppress(EOFError, KeyboardInterrupt),
    ):
        faulthandler.register(signal.SIGUSR1, file=stack_file)
        for number in itertools.count():
            call = connection.recv_bytes()
            store = dist.FileStore(str(Path(directory, f"store-{number}")), num_ranks)
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


# ---- both ---------------------------------------------------------------------------------------


def _require_ranks(num_ranks: int) -> None:
    if num_ranks < 1:
        raise ValueError(f"num_ranks ({num_ranks}) must be at least 1")


def _stuck_message(stuck: dict[int, str], num_ranks: int, timeout: float) -> str:
    """Name the stuck ranks; those that stand at the same place share a stack."""
    by_stack: dict[str, list[int]] = {}
    for rank in sorted(stuck):
        by_stack.setdefault(stuck[rank], []).append(rank)
    places = "\n".join(f"ranks {ranks}:\n{stack}" for stack, ranks in by_stack.items())
    return (
        f"ranks {sorted(stuck)} of {num_ranks} still run after {timeout} s; "
        f"most often a collective that not every rank joins\n{places}"
    )
