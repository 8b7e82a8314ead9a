"""Tables on the terminal, and in full width where they go to a file or a pipe."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 10_000
"""Columns of a line that no terminal has to show: nothing is cut or wrapped."""


def print_table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print rows under headings; numbers are set to the right, with commas."""
    console = Console()
    if not console.file.isatty():
        console = Console(width=WIDE)
    lines = [list(row) for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        are_numbers = all(isinstance(line[number], int) or not line[number] for line in lines)
        table.add_column(heading, justify="right" if are_numbers else "left", overflow="fold")
    for line in lines:
        table.add_row(*(Text(_spell(value)) for value in line))
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def spell_bytes(count: int) -> str:
    """A number of bytes with three digits and a binary unit."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1000 and units[1:]:
        size /= 1024
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def _spell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
