"""The pictures that stand in Markdown, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import record
from matplotlib.ticker import MaxNLocator

from sweeping.look import NAMES, look
from sweeping.table import Curve, Row, front, losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(rows: Sequence[Row], own: str, path: Path) -> None:
    """The front above; drops over time and by layer, and the loss, below. In one PNG.

    Losses below are compared with that of the variant `own`.
    """
    plt = record.pyplot()
    is_live = rows[0].loss is not None
    pairs = [("drops", "speed"), ("drops", "loss"), ("loss", "speed")]
    figure, grid = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    for axes, pair in zip(grid[0], pairs if is_live else [("drops", "padding")], strict=False):
        _trade(axes, rows, *pair)
    drops = [[(x, 100 * y) for x, y in row.drop_rate_over_time] for row in rows]
    _lines(grid[1][0], rows, drops, "optimizer step", NAMES["drops"])
    drops = [[(n, 100 * y) for n, y in enumerate(row.drop_rate_by_layer)] for row in rows]
    _lines(grid[1][1], rows, drops, "MoE layer", NAMES["drops"], marked=True)
    if is_live:
        above, name = losses(rows, own).by_step, f"held-out loss above that of {own} (nats)"
        _lines(grid[1][2], rows, above, "optimizer step", name, marked=True)
    for axes in grid.flat:
        axes.set_visible(axes.has_data())
    handles, labels = grid[1][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6))
    figure.savefig(path)
    plt.close(figure)


def _trade(axes: Axes, rows: Sequence[Row], x: str, y: str) -> None:
    """Two measures of every variant; those that no other beats are filled."""
    unbeaten = {row.label for row in front(rows)}
    for number, row in enumerate(rows):
        values = {
            "drops": 100 * row.rates.drop_rate,
            "speed": row.tokens_per_s,
            "loss": row.loss,
            "padding": 100 * row.rates.padding_waste,
        }
        style = look(number)
        axes.plot(
            [values[x]],
            [values[y]],
            style.marker,
            color=style.colour,
            markerfacecolor=style.colour if row.label in unbeaten else "none",
            markersize=9,
            markeredgewidth=2,
        )
    axes.set(xlabel=NAMES[x], ylabel=NAMES[y])
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.margins(0.12)


def _lines(
    axes: Axes, rows: Sequence[Row], curves: Sequence[Curve], x: str, y: str, marked: bool = False
) -> None:
    for number, (row, curve) in enumerate(zip(rows, curves, strict=True)):
        style = look(number)
        axes.plot(
            [point[0] for point in curve],
            [point[1] for point in curve],
            linestyle=style.line,
            color=style.colour,
            marker=style.marker if marked or len(curve) == 1 else "",
            markersize=5,
            label=row.label,
        )
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
