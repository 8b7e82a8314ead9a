"""One run of a name at a time: a lock on the run's folder that the kernel frees with its holder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import torch.distributed as dist

from moetrain.errors import UserError
from moetrain.mesh import raise_alike

LOCK_FILE = "lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}
"""What file systems without locks answer."""


@contextmanager
def hold(folder: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Keep other runs out of a run's folder, which is made where it is missing; a collective.

    Rank 0 holds FOLDER/lock, which names it; for who has it, it waits `patience_s`. However that
    process ends, the lock ends with it; the file stays, because removing it could part two runs
    that wait for each other.

    Raises UserError, alike on every rank, where another process holds it, or the folder cannot be
    made or locked. A file system without locks is a warning.
    """
    file, error = None, None
    if dist.get_rank() == 0:
        try:
            file = _take(folder, patience_s)
        except UserError as problem:
            error = str(problem)
    raise_alike(error)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):  # who looks before the next holder has written finds no name
                file.truncate(0)
            file.close()


def _take(folder: Path, patience_s: float) -> IO[bytes]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not emptied: it is not ours yet. Unbuffered: closing it must not write.
        file = (folder / LOCK_FILE).open("a+b", buffering=0)
    except OSError as error:
        raise UserError(
            f"out ({folder.parent}) cannot hold {folder}: {error.strerror}; set one that can"
        ) from None
    try:
        _lock(file, time.monotonic() + patience_s)
    except BlockingIOError:
        with file:
            file.seek(0)
            holder = _named(file.read().decode(errors="replace"))
        raise UserError(
            f"{folder} is in use by {holder}; end that run first, or give this one another name"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(
                f"{folder / LOCK_FILE} cannot be locked: {error.strerror}; set an out on a disk "
                "that works"
            ) from None
        warnings.warn(
            f"{folder / LOCK_FILE} cannot be locked ({error.strerror}): another run of this name "
            "would go unnoticed",
            stacklevel=2,
        )
    with suppress(OSError):  # on a full disk it holds the lock without a name
        file.truncate(0)
        file.write(_holder().encode())
    return file


def _lock(file: IO[bytes], deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.5)


def _holder() -> str:
    since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n"


def _named(content: str) -> str:
    """The holder in words; it may have the lock and not have written yet."""
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, TypeError, KeyError):
        return "another process"
