"""The panels that pictures of a run are made of: each draws one thing on given axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrain.plots.history import (
    History,
    by_layer,
    column,
    drop_rate_by_choice,
    relative_load,
    running_mean,
    spill_rate,
    step_edges,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import FigureBase
    from matplotlib.ticker import MaxNLocator

Draw = Callable[["Axes", History], None]

STYLE: Mapping[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": 150,
}

# Okabe and Ito's palette: told apart with any colour vision.
_BLACK, _BLUE, _ORANGE, _GREY = "#000000", "#0072b2", "#d55e00", "#777777"
_LAYERS, _CHOICES = "viridis", "plasma"
_LOAD = "RdBu_r"  # white where the load is even
_SMOOTH_FROM = 60  # points from which a noisy curve gets a running mean
_FEW = 8  # curves that a legend can name, and that can be told apart unsmoothed


def draw_loss(axes: Axes, run: History) -> None:
    """Training and held-out loss over steps, with the references as levels."""
    skipped = run.train[-1].get("bad_steps") if run.train else 0
    title = f"Loss ({skipped} step{'s' * (skipped > 1)} skipped)" if skipped else "Loss"
    _label(axes, title, "cross-entropy (nats per token)")
    axes.margins(y=0.1)  # room for the label of the lowest level
    if run.train:
        _curve(axes, run.steps, column(run.train, "loss"), _BLUE, "training")
    if run.evals:
        steps, losses = column(run.evals, "step"), column(run.evals, "eval_loss")
        axes.plot(steps, losses, "o-", color=_ORANGE, markersize=4, label="held-out")
    for name, nats in run.references.items():
        is_lowest = nats == min(run.references.values()) < max(run.references.values())
        axes.axhline(nats, color=_GREY, linestyle="--", linewidth=1)
        axes.annotate(
            f"{name} {nats:.2f}",
            (1, nats),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3 if is_lowest else 3),  # apart, however close the levels
            textcoords="offset points",
            horizontalalignment="right",
            verticalalignment="top" if is_lowest else "bottom",
            color=_GREY,
            fontsize=9,
        )
    _legend(axes)


def draw_drops(axes: Axes, run: History) -> None:
    """Share of assignments dropped, by layer and over all, and of tokens left without expert; of
    those spilled, where there are some."""
    _label(axes, "Drops", "share (%)")
    if run.num_layers > 1:
        _curves(axes, run.steps, 100 * by_layer(run.train, "drop_rate"), _LAYERS)
    for name, colour, style, label in (
        ("drop_rate", _BLACK, "-", "assignments"),
        ("token_drop_rate", _ORANGE, "--", "tokens with no expert"),
    ):
        _curve(axes, run.steps, 100 * column(run.train, name), colour, label, style=style)
    spilled = spill_rate(run.train)
    if spilled.any():
        _curve(axes, run.steps, 100 * spilled, _BLUE, "spilled")
    if run.evals:
        steps, percent = column(run.evals, "step"), 100 * column(run.evals, "eval_drop_rate")
        axes.plot(steps, percent, "o", color=_GREY, markersize=4, label="held-out")
    _from_zero(axes, at_least=1)
    _legend(axes)


def draw_drops_by_choice(axes: Axes, run: History) -> None:
    """Share of each choice's assignments dropped, as a mean over layers."""
    _label(axes, "Drops by choice", "dropped (%)")
    percent = 100 * drop_rate_by_choice(run.train)
    if len(percent) <= _FEW:
        labels = [f"choice {number}" for number in range(1, len(percent) + 1)]
        _curves(axes, run.steps, percent, _CHOICES, labels)
        _legend(axes)
    else:
        _curves(axes, run.steps, percent, _CHOICES)
        add_scale(axes.figure, [axes], 1, len(percent), _CHOICES, "choice")
    _from_zero(axes, at_least=1)


def by_layer_panel(name: str, title: str, unit: str, at_least: float, factor: float = 1) -> Draw:
    """A panel with one curve a layer, times `factor`, and their mean; the axis starts at 0."""

    def draw(axes: Axes, run: History) -> None:
        _label(axes, title, unit)
        values = factor * by_layer(run.train, name)
        if run.num_layers > 1:
            _curves(axes, run.steps, values, _LAYERS)
        _curve(axes, run.steps, values.mean(axis=0), _BLACK, "mean of layers")
        _from_zero(axes, at_least)

    return draw


def run_panel(name: str, title: str, unit: str) -> Draw:
    """A panel with one figure of the whole run."""

    def draw(axes: Axes, run: History) -> None:
        _label(axes, title, unit)
        _curve(axes, run.steps, column(run.train, name), _BLACK, title)
        low, high = axes.get_ylim()
        least = 0.05 * abs(low + high) / 2  # rounding errors are no curve
        if high - low < least:
            axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)

    return draw


def draw_throughput(axes: Axes, run: History) -> None:
    """Tokens per second over steps; the title tells the median and the MFU where known."""
    from matplotlib.ticker import EngFormatter

    title = "Throughput"
    utilisation = column(run.train, "mfu")
    if np.isfinite(utilisation).any():
        title += f" (median MFU {100 * np.nanmedian(utilisation):.1f} %)"
    _label(axes, title, "tokens per second")
    _curve(axes, run.steps, column(run.train, "tokens_per_s"), _BLUE, "")
    _from_zero(axes, at_least=1)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def draw_loads(figure: FigureBase, run: History, layers: Sequence[int], num_columns: int) -> None:
    """A panel per layer: load by expert over steps, all on one colour scale."""
    num_columns = min(num_columns, len(layers))
    num_rows = math.ceil(len(layers) / num_columns)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True)
    loads = [relative_load(run.train, layer) for layer in layers]
    norm, extend = _load_scale(np.stack(loads))
    x_edges, y_edges = step_edges(run.steps), np.arange(len(loads[0]) + 1) - 0.5
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    for axes, layer, load in zip(grid.flat, layers, loads, strict=False):
        image = axes.pcolorfast(x_edges, y_edges, load, norm=norm, cmap=_LOAD)
        axes.set_title(f"MoE layer {layer}", fontsize=10, fontweight="normal")
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(_integer_ticks(4))
        axes.yaxis.set_major_locator(_integer_ticks(5))
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    bar = figure.colorbar(image, ax=grid, extend=extend, aspect=30, pad=0.02)
    bar.set_label("load of the expert / mean load")


def add_layer_scale(figure: FigureBase, panels: Sequence[Axes], run: History) -> None:
    """Beside panels with a curve a layer, the colours of the layers."""
    if run.num_layers > 1:
        add_scale(figure, panels, 0, run.num_layers - 1, _LAYERS, "MoE layer")


def add_scale(
    figure: FigureBase, panels: Sequence[Axes], first: int, last: int, colours: str, label: str
) -> None:
    """A colour bar of the integers from `first` to `last`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    count = last - first + 1
    edges = np.arange(count + 1) + first - 0.5
    scale: ScalarMappable = ScalarMappable(BoundaryNorm(edges, count), _colour_map(colours, count))
    bar = figure.colorbar(scale, ax=panels, aspect=30, pad=0.02, ticks=_integer_ticks())
    bar.ax.minorticks_off()
    bar.set_label(label)


def _load_scale(loads: np.ndarray) -> tuple[Normalize, str]:
    """Colours from 0 over 1 (even) to between 2 and 4; the rare loads beyond share the last."""
    from matplotlib.colors import TwoSlopeNorm

    top = min(4.0, max(2.0, math.ceil(np.quantile(loads, 0.999))))
    return TwoSlopeNorm(vcenter=1, vmin=0, vmax=top), "max" if loads.max() > top else "neither"


def _colour_map(name: str, count: int) -> Any:
    import matplotlib
    from matplotlib.colors import ListedColormap

    # The last tenth of the map is too light for a line on white.
    return ListedColormap(matplotlib.colormaps[name](np.linspace(0, 0.9, count)))


def _curves(
    axes: Axes, steps: np.ndarray, values: np.ndarray, colours: str, labels: Sequence[str] = ()
) -> None:
    """Many thin curves, in the colours of an ordered scale; of very many, only running means."""
    colour_map, are_few = _colour_map(colours, len(values)), len(values) <= _FEW
    for index, one in enumerate(values):
        label = labels[index] if labels else ""
        width = 1.0 if are_few else 0.7
        _curve(axes, steps, one, colour_map(index), label, width=width, shows_raw=are_few)


def _curve(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    colour: Any,
    label: str,
    style: str = "-",
    width: float = 1.7,
    shows_raw: bool = True,
) -> None:
    """A curve; of a long one the running mean, on top of the curve itself, drawn faint."""
    marker = "o" if len(values) == 1 else ""  # a single point has no line to be seen by
    if len(values) >= _SMOOTH_FROM:
        if shows_raw:
            axes.plot(steps, values, color=colour, linewidth=width / 2, alpha=0.25)
        values = running_mean(values, window=2 * (len(values) // 60) + 1)
    axes.plot(
        steps,
        values,
        style,
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=width,
        label=label,
    )


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(_integer_ticks())


def _legend(axes: Axes) -> None:
    """Between title and curves, where it covers neither; as many rows as it takes."""
    labels = [text for text in axes.get_legend_handles_labels()[1] if text]
    num_columns = min(len(labels), 4 if max(map(len, labels), default=0) < 10 else 3)
    if not num_columns:
        return
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=num_columns,
        borderaxespad=0.2,
        borderpad=0,
        columnspacing=1.2,
        handlelength=1.6,
    )
    num_rows = math.ceil(len(labels) / num_columns)
    axes.set_title(axes.get_title(loc="left"), pad=6 + 14 * num_rows)


def _from_zero(axes: Axes, at_least: float) -> None:
    """Start the vertical axis just below 0, where a curve at 0 is seen, and let it reach a value
    beside which 0 looks like 0."""
    top = max(at_least, axes.get_ylim()[1])
    axes.set_ylim(-0.02 * top, top)


def _integer_ticks(most: int = 6) -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True, min_n_ticks=1)
