"""How a rank that fails tells its launcher why, so that the first error of all is printed last.

torchrun gives each rank the name of a file for that, and shows the earliest in the end. What
`moetrain.torchrun` needs beside it, to tell causes from consequences, stands in the same file.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Literal

from moetrain.errors import RunError, UserError
from moetrain.redact import redact

FAILED, BAD_INPUT = 1, 2
"""Exit codes; see `moetrain.stopping` for those of runs that a signal stopped."""
LAUNCHER = "MOETRAIN_LAUNCHER"
"""For ranks whose launcher is `moetrain.torchrun`: its process id."""

RESTARTS = "MOETRAIN_RESTARTS"
"""How often it has started them again."""

Kind = Literal["mistake", "final", "hang", "failure", "unbegun", "consequence"]
"""mistake: the user's; final: not to be tried again; hang: the watchdog's finding; unbegun: stopped
by a signal before the first step; consequence: of another rank's end."""
_LOST = re.compile(
    r"gloo/|connection (was )?(closed|reset)|broken pipe|wait timeout|NCCL", re.IGNORECASE
)
"""What torch says when another rank is gone, or has not come to a collective in time."""


def is_watched() -> bool:
    """Whether the launcher prints the first error of all ranks by itself (`moetrain.torchrun`)."""
    return LAUNCHER in os.environ


def end_with_launcher() -> None:
    """Have the kernel kill this process when its launcher dies, so that no rank is left behind to
    hold GPUs and the run's folder. Where the kernel can (Linux)."""
    if not is_watched() or sys.platform != "linux":
        return
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    launcher = os.environ[LAUNCHER]
    if os.getppid() != int(launcher) and not os.path.exists(f"/proc/{launcher}"):  # it died before
        os._exit(FAILED)


def kind_of(error: BaseException) -> Kind:
    """What kind of failure an exception is."""
    if isinstance(error, UserError):
        return "mistake"
    if isinstance(error, RunError):
        return "final"
    is_lost = any(isinstance(one, RuntimeError) and _LOST.search(str(one)) for one in _chain(error))
    return "consequence" if is_lost else "failure"


def record_error(error: BaseException) -> bool:
    """Leave an exception for the launcher: its message where it was meant for the user, else its
    traceback. Returns whether `moetrain.torchrun` will print it."""
    kind = kind_of(error)
    has_message = kind in ("mistake", "final")
    text = str(error) if has_message else "".join(traceback.format_exception(error))
    return record(text, kind) and is_watched()


def record(text: str, kind: Kind = "failure") -> bool:
    """Leave the reason of this process's end where the launcher looks for it; returns whether it is
    there."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    now, text = time.time(), redact(text)
    # The format that torchrun reads, and a key of our own.
    content = {
        "message": {
            "message": text,
            "extraInfo": {"py_callstack": text, "timestamp": str(int(now))},
        },
        "moetrain": {"kind": kind, "time": now},
    }
    partial = f"{path}.{threading.get_ident()}"  # the watchdog may write at the same time
    try:
        with open(partial, "w") as file:
            json.dump(content, file)
        os.replace(partial, path)
    except OSError:  # a full disk, say
        return False
    return True


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and those it came from."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__
