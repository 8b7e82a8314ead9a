"""Words for whoever watches, who may have gone: a disk is full, a reader has left, a terminal is
closed. That ends no training, and keeps no process from ending.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import IO, Any, cast, final


def say(text: str, file: IO[str] | None = None) -> None:
    """Print a line at once, by default on standard error; nothing where that cannot be written."""
    print(text, file=forgiving(file or sys.stderr), flush=True)


def forgiving(file: IO[str] | None) -> IO[str]:
    """The file, but what it cannot write is lost without an error; None, as a standard stream is
    that was closed before the process began, is a file that loses all."""
    return cast(IO[str], _Forgiving(file or open(os.devnull, "w")))


def forget(file: IO[str] | None) -> None:
    """Let a file that cannot be written lose what it still holds: at the end of the process Python
    would try again, and exit with a code of its own."""
    if file is None:
        return
    try:
        file.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), file.fileno())


class OutputError(OSError):
    """Standard output cannot be written."""


@contextmanager
def telling_output_errors() -> Iterator[None]:
    """Tell failures to write standard output from those to write a file, by `OutputError`."""
    if sys.stdout is None:
        yield
        return
    with redirect_stdout(cast(IO[str], _Telling(sys.stdout))):
        try:
            yield
        except SystemExit:  # after help
            sys.stdout.flush()
            raise
        sys.stdout.flush()


class _Wrapped:
    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@final
class _Forgiving(_Wrapped):
    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()


@final
class _Telling(_Wrapped):
    def write(self, text: str) -> int:
        with _as_output_error():
            return self._file.write(text)

    def flush(self) -> None:
        with _as_output_error():
            self._file.flush()


@contextmanager
def _as_output_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(*error.args) from error
