"""How far a conversion is, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def bar(tensors: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, if that is a terminal; call what it gives for each tensor that is done."""
    terminal, is_seen = Console(stderr=True), sys.stderr.isatty()
    with Progress(console=terminal, transient=True, disable=not is_seen) as progress:
        task = progress.add_task("tensors", total=tensors)
        yield lambda: progress.advance(task)
