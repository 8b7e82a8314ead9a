"""Signals that ask a run to stop: a request, met after the step, not an end in its middle."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self, final

from moetrain.failure import record
from moetrain.saying import say

STOPPED = 75
"""Exit code of a run that was stopped by a signal, and can be continued (EX_TEMPFAIL)."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What schedulers and terminals send; Slurm's early warning is often SIGUSR1."""
REQUEST = signal.SIGUSR1
"""The one that only asks, however often it comes: launchers pass this on to ranks that may have had
another already."""
ECHO_S = 1.0
"""Signals that follow the first so soon are the same request, sent several ways."""


@final
class StopSignals:
    """Takes the signals of this process, within a `with` block in the main thread.

    The first one asks to stop, which `asked` then tells; before `defer` was called there is nothing
    to save, and it ends the process. A later one ends the process at once, wherever it is.
    """

    def __init__(self, saves: bool) -> None:
        """`saves` tells whether the run saves at all, so that it can be continued."""
        self._saves = saves
        self._is_deferred = False
        self._is_done = False
        self._first: tuple[signal.Signals, float] | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal came to this process."""
        return self._first is not None

    def code(self) -> int:
        """Exit code of a run that stopped by request: 75, or as shells count an end by a signal."""
        number = self._first[0] if self._first else REQUEST  # it came to another rank
        return STOPPED if self._saves else 128 + (signal.SIGTERM if number == REQUEST else number)

    def defer(self) -> None:
        """From now on the first signal is a request."""
        self._is_deferred = True

    def done(self) -> None:
        """All is saved and said: from now on a signal ends the process with `code`."""
        self._is_done = True

    def __enter__(self) -> Self:
        # Python runs its handlers between two instructions of the main thread, which may be inside
        # a collective for minutes. The numbers of signals reach a thread through a pipe at once.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_pipe = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, _nothing) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_pipe)
        os.write(self._write, END)
        self._thread.join()
        os.close(self._write)
        os.close(self._read)

    def _listen(self) -> None:
        while END not in (numbers := os.read(self._read, 64)):
            for number in numbers:
                if number in SIGNALS:
                    self._take(signal.Signals(number))

    def _take(self, number: signal.Signals) -> None:
        if self._is_done:
            os._exit(self.code())
        if self._first is None:
            self._first = number, time.monotonic()
            if not self._is_deferred:
                text = f"stopped by {number.name} before the first step"
                record(text, "unbegun")  # agents end the others so when one has failed
                _end(text, self.code())
            _say("stopping after this step; a second signal ends the run at once")
        elif number != REQUEST and time.monotonic() - self._first[1] > ECHO_S:
            _end(f"ended at once by a second signal, {number.name}", 128 + number)


END = b"\0"
"""No signal's number."""


def _nothing(number: int, frame: FrameType | None) -> Any:
    """A handler in Python, without which no number is written to the pipe."""


def _say(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"moetrain: {text}")


def _end(text: str, code: int) -> None:
    _say(text)
    os._exit(code)
