"""Ranks as threads of this process."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist

from moetrain.testing.report import (
    DEFAULT_TIMEOUT,
    STOP_SECONDS,
    require_ranks,
    stuck_message,
)

WAKE_SECONDS = 1.0
"""How long ranks have to end by themselves once they are woken."""


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
    require_ranks(num_ranks)
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
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    if not _simulating.acquire(blocking=False):
        raise RuntimeError("simulate_ranks does not nest, nor run in two threads at once")
    # torch 2.11, built for CUDA and run without a GPU, keeps for all threads what the first thread
    # with fake tensors has made, and reads it after that thread's end (pytorch #178950). DTensor
    # uses them: let the first be this thread, which outlives the ranks. Not needed from 2.12 on.
    with FakeTensorMode():
        pass
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
        self.cores = _present_core()
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
            raise TimeoutError(stuck_message(stuck, self.num_ranks, timeout))
        return self.results

    def _rank(self, rank: int) -> None:
        """Life of one rank."""
        failure = None
        if self.cores:
            with suppress(OSError):  # a core that was taken from this process meanwhile
                os.sched_setaffinity(0, self.cores)  # of this thread alone
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
        """Wake the ranks that wait for one that will not come, then force those that compute.

        One that is inside native code for longer than that is left to end when it comes back.
        """
        for force, seconds in ((False, WAKE_SECONDS), (True, STOP_SECONDS)):
            deadline = time.monotonic() + seconds
            for thread in self.threads if force else ():
                _raise_in(thread, SystemExit)
            while self._wake() and time.monotonic() < deadline:
                time.sleep(0.01)

    def _wake(self) -> bool:
        """Wake every waiting rank; tell whether any rank is left."""
        self.store.abort()
        # A group made while this walks over the groups is woken the next time.
        with suppress(RuntimeError):
            self.group_class.exception_handle(None)
        return any(thread.is_alive() for thread in self.threads)


def _present_core() -> set[int]:
    """The core that this thread runs on, as Linux tells; elsewhere none.

    Ranks take turns anyway, for they share an interpreter. On one core they do so without a fight
    over it.
    """
    with suppress(OSError):
        after_name = Path("/proc/thread-self/stat").read_text().rpartition(")")[2]
        return {int(after_name.split()[36])}
    return set()


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
