"""Which pictures a run has, and how their panels are laid out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.errors import UserError
from moetrain.plots.history import History, history
from moetrain.plots.panels import (
    STYLE,
    Draw,
    add_layer_scale,
    by_layer_panel,
    draw_drops,
    draw_drops_by_choice,
    draw_loads,
    draw_loss,
    draw_throughput,
    run_panel,
)
from moetrain.progress import evenly_spaced
from moetrain.sinks import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

PLOTS_FOLDER = "plots"
"""Where a run keeps its pictures."""

_OVERVIEW_LAYERS = 4
_SLOTS = (
    by_layer_panel("padding_waste", "Empty slots", "share of the slots (%)", 1, factor=100),
    by_layer_panel("effective_capacity_factor", "Slots provided", "slots / assignments", 1),
    by_layer_panel("dropped_gate_mass", "Gate weight dropped", "share (%)", 1, factor=100),
)
_BALANCE = (
    by_layer_panel("max_vio", "Largest load", "(max - mean) / mean", 0.1),
    by_layer_panel("load_cv", "Spread of the load", "standard deviation / mean", 0.1),
    by_layer_panel("load_entropy", "Evenness of the load", "exp(entropy) / experts", 1),
    by_layer_panel("dead_experts", "Dead experts", "experts nobody chose", 1),
    run_panel("balance_loss", "Balance loss", "1 when balanced"),
    run_panel("z_loss", "Router z-loss", "mean squared logsumexp"),
)


def write_plots(run_dir: Path, byte_entropy: Mapping[str, float] | None = None) -> list[Path]:
    """Draw RUN/plots/*.png from RUN/metrics.jsonl; returns the files, the overview first.

    `byte_entropy` names reference losses in nats per byte of held-out text (unigram, bigram); the
    evaluation lines tell how many bytes a token has, so without one no reference is drawn. A dense
    run has no pictures of drops, slots, load and balance; a run without lines has none at all.

    Raises UserError when there is no metrics.jsonl.
    """
    import matplotlib

    try:
        lines = read_metrics(run_dir)
    except FileNotFoundError:
        raise UserError(f"{run_dir / METRICS_FILE} does not exist; is {run_dir} a run?") from None
    folder = run_dir / PLOTS_FOLDER
    folder.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(dict(STYLE)):
        for name, figure in figures(
            history(run_dir.resolve().name, lines, byte_entropy or {})
        ).items():
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths


def figures(run: History) -> dict[str, Figure]:
    """The pictures of a run by name."""
    if not run.train and not run.evals:
        return {}
    found = {"overview": _overview(run), "loss": _row(run, [draw_loss], width=7)}
    if run.num_layers:
        found |= {
            "drops": _drops(run),
            "slots": _by_layer(run, _SLOTS, num_rows=1),
            "load": _load(run),
            "balance": _by_layer(run, _BALANCE, num_rows=2),
        }
    if run.train:
        found["throughput"] = _row(run, [draw_throughput], width=7)
    return found


def _figure(run: History, width: float, height: float) -> Figure:
    # Without pyplot there is no display to open and no global state; PNG means the Agg canvas.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    figure.suptitle(_shortened(run.name, int(9 * width)), fontsize=12)
    return figure


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 3]}..."


def _row(run: History, draws: Sequence[Draw], width: float) -> Figure:
    figure = _figure(run, width, 4.4)
    for axes, draw in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
        draw(axes, run)
    return figure


def _drops(run: History) -> Figure:
    """By layer, and by choice where there is more than one."""
    draws = [draw_drops, draw_drops_by_choice] if run.num_choices > 1 else [draw_drops]
    figure = _row(run, draws, width=6.6 * len(draws))
    add_layer_scale(figure, figure.axes[:1], run)
    return figure


def _by_layer(run: History, draws: Sequence[Draw], num_rows: int) -> Figure:
    num_columns = len(draws) // num_rows
    figure = _figure(run, 4.4 * num_columns + 0.8, 0.8 + 3.4 * num_rows)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes, draw in zip(grid.flat, draws, strict=True):
        draw(axes, run)
    if run.num_layers > 1:
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right")
    add_layer_scale(figure, list(grid.flat), run)
    return figure


def _overview(run: History) -> Figure:
    draws = [draw_loss]
    if run.num_layers:
        draws.append(draw_drops)
    if run.train:
        draws.append(draw_throughput)
    width = max(7, 4.6 * len(draws))
    if not run.num_layers:
        return _row(run, draws, width)
    figure = _figure(run, width, 7.8)
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, hspace=0.04)
    panels: FigureBase = top
    grid = panels.subplots(1, len(draws), squeeze=False)[0]
    for axes, draw in zip(grid, draws, strict=True):
        draw(axes, run)
    add_layer_scale(panels, [grid[1]], run)
    draw_loads(bottom, run, evenly_spaced(run.num_layers, _OVERVIEW_LAYERS), num_columns=4)
    return figure


def _load(run: History) -> Figure:
    num_columns = min(run.num_layers, 4 if run.num_layers <= 12 else 8)
    num_rows = math.ceil(run.num_layers / num_columns)
    figure = _figure(run, max(6.5, 2.6 * num_columns + 1), 1.4 + 2.2 * num_rows)
    draw_loads(figure, run, range(run.num_layers), num_columns)
    return figure
