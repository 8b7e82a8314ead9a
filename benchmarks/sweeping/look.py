"""How variants look in every picture: the same colour and sign throughout."""

from __future__ import annotations

from typing import NamedTuple

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c8c8c")
"""Okabe and Ito's palette, told apart with any colour vision; of its black and yellow, which a dark
or a light ground swallows, a grey."""
NAMES = {
    "drops": "assignments dropped (%)",
    "speed": "tokens per second",
    "loss": "held-out loss (nats per token)",
    "padding": "slots empty (%)",
}
"""Of what is measured, as axes are labelled."""
_SIGNS = (("circle", "o"), ("square", "s"), ("diamond", "D"), ("triangle-up", "^"), ("cross", "P"))
_DASHES = (
    ("solid", "-"),
    ("dash", "--"),
    ("dot", ":"),
    ("dashdot", "-."),
    ("longdash", (0, (8, 2))),
)


class Look(NamedTuple):
    """Of one variant."""

    colour: str
    symbol: str
    """plotly's name of the sign."""
    marker: str
    """matplotlib's."""
    dash: str
    """plotly's name of the line."""
    line: str | tuple[int, tuple[int, int]]
    """matplotlib's."""


def look(number: int) -> Look:
    """The n-th variant's: colours first, then other signs and lines."""
    turn = number // len(COLOURS) % len(_SIGNS)
    symbol, marker = _SIGNS[turn if turn else number % len(_SIGNS)]
    dash, line = _DASHES[turn]
    return Look(COLOURS[number % len(COLOURS)], symbol, marker, dash, line)
