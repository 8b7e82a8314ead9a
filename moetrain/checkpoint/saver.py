"""Saving beside the training: a snapshot is taken at once, and a thread writes it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, final

import torch.distributed as dist
from torch import Tensor

from moetrain.checkpoint.folder import prune
from moetrain.checkpoint.snapshot import Snapshot
from moetrain.checkpoint.transfer import save
from moetrain.mesh import BACKGROUND, gather

WRITING_LIMIT = timedelta(hours=1)
"""How long ranks wait for the slowest of them to write its share."""


class Outcome(NamedTuple):
    """How a save ended, alike on every rank but for the time."""

    step: int
    error: Exception | None
    """CheckpointError where it was the disk's fault: nothing was committed, nothing older lost."""
    seconds: float
    """How long this rank took to write, and waited for the others."""


@final
class Saver:
    """Saves the checkpoints of a run, one at a time, and keeps the newest ones.

    Asynchronously, training is held up by the copy into host memory alone, and by the save before
    where that is still being written.
    """

    def __init__(self, run_dir: Path, keep: int, asynchronous: bool) -> None:
        """Collective: every rank of the default process group makes one."""
        self._run_dir, self._keep = run_dir, keep
        self._snapshot = Snapshot() if asynchronous else None
        # A group of its own, because the thread communicates while training does, and disks may be
        # slower than any step. It ends with the default group.
        self._group: Any = dist.new_group(timeout=WRITING_LIMIT, group_desc=BACKGROUND)
        self._thread: threading.Thread | None = None
        self._outcomes: deque[Outcome] = deque()

    def save(self, step: int, tensors: dict[str, Tensor], extra: dict[str, Any]) -> None:
        """Save as `moetrain.checkpoint.save` does, then delete checkpoints past those to keep.

        How that ends, `outcomes` tells later. Once this returns, the tensors may change.
        """
        self.wait()
        if self._snapshot is None:
            self._write(step, tensors, extra)
            return
        snapshot = self._snapshot.take(tensors)
        # A daemon: a process that fails elsewhere does not stay for the sake of a save.
        self._thread = threading.Thread(
            target=self._write, args=(step, snapshot, extra), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def outcomes(self) -> Iterator[Outcome]:
        """The saves that have ended since the last call; ranks may hear of one at other times."""
        while self._outcomes:
            yield self._outcomes.popleft()

    def _write(self, step: int, tensors: dict[str, Tensor], extra: dict[str, Any]) -> None:
        error, started = None, time.perf_counter()
        try:
            save(self._run_dir, step, tensors, extra, self._group)
            prune(self._run_dir, self._keep)
            # Rank 0 alone deletes, which may take long; the others would train on and miss it.
            gather(None, self._group)
        except Exception as failure:  # for the thread that trains to judge
            error = failure
        self._outcomes.append(Outcome(step, error, time.perf_counter() - started))
