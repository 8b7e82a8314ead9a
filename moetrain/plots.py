"""Pictures of a run from its metrics.jsonl: loss, drops, load by expert, throughput."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moetrain.errors import UserError
from moetrain.progress import evenly_spaced
from moetrain.sinks import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.ticker import MaxNLocator

Lines = Sequence[Mapping[str, Any]]

PLOTS_FOLDER = "plots"
"""Where a run keeps its pictures."""

# Okabe and Ito's palette: told apart with any colour vision.
_BLACK, _BLUE, _ORANGE, _GREY = "#000000", "#0072b2", "#d55e00", "#777777"
_LAYER_COLOURS = "viridis"
_LOAD_COLOURS = "RdBu_r"  # white where the load is even
_STYLE: dict[Any, Any] = {
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
_SMOOTH_FROM = 60  # points from which a noisy curve gets a running mean
_OVERVIEW_LAYERS = 4


class _Run(NamedTuple):
    train: Lines
    evals: Lines
    references: Mapping[str, float]  # name -> nats per token

    @property
    def num_layers(self) -> int:
        return len(self.train[-1]["layers"]) if self.train else 0


def write_plots(run_dir: Path, byte_entropy: Mapping[str, float] | None = None) -> list[Path]:
    """Draw RUN/plots/*.png from RUN/metrics.jsonl; returns the files, the overview first.

    `byte_entropy` names reference losses in nats per byte of held-out text (unigram, bigram); the
    evaluation lines tell how many bytes a token has, so without one no reference is drawn. A dense
    run has no pictures of drops and load; a run without lines has none at all.

    Raises UserError when there is no metrics.jsonl.
    """
    import matplotlib

    try:
        lines = read_metrics(run_dir)
    except FileNotFoundError:
        raise UserError(f"{run_dir / METRICS_FILE} does not exist; is {run_dir} a run?") from None
    evals = [line for line in lines if "eval_loss" in line]
    run = _Run(
        train=[line for line in lines if "loss" in line],
        evals=evals,
        references=per_token(byte_entropy or {}, evals),
    )
    folder = run_dir / PLOTS_FOLDER
    folder.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(_STYLE):
        for name, figure in _figures(run).items():
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths


def per_token(byte_entropy: Mapping[str, float], evals: Lines) -> dict[str, float]:
    """Nats per byte to nats per token, by the bytes per token of the last evaluation."""
    for line in reversed(evals):
        if line["eval_loss"] and line["eval_nats_per_byte"]:
            bytes_per_token = line["eval_loss"] / line["eval_nats_per_byte"]
            return {name: nats * bytes_per_token for name, nats in byte_entropy.items()}
    return {}


def column(lines: Lines, name: str) -> np.ndarray:
    """One field of every line, float64; NaN where it is null."""
    return np.array([math.nan if line[name] is None else line[name] for line in lines], float)


def relative_load(lines: Lines, layer: int) -> np.ndarray:
    """(experts, lines): load of one layer's experts over their mean; 0 without assignments."""
    load = np.array([line["layers"][layer]["load"] for line in lines], float).T
    mean = load.mean(axis=0)
    return np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the `window` (odd) values around each; fewer at the ends, NaN left out."""
    known = np.isfinite(values)
    padded = np.pad(np.where(known, values, math.nan), window // 2, constant_values=math.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    counts = np.isfinite(windows).sum(axis=1)
    sums = np.nansum(windows, axis=1)
    return np.divide(sums, counts, out=np.full(len(values), math.nan), where=counts > 0)


def step_edges(steps: np.ndarray) -> np.ndarray:
    """(lines + 1): where the column of each step begins and ends, halfway to its neighbours."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _figures(run: _Run) -> dict[str, Figure]:
    if not run.train and not run.evals:
        return {}
    figures = {"overview": _overview(run), "loss": _single(_draw_loss, run)}
    if run.num_layers:
        figures |= {"drops": _single(_draw_drops, run), "load": _load_figure(run)}
    if run.train:
        figures["throughput"] = _single(_draw_throughput, run)
    return figures


def _figure(width: float, height: float) -> Figure:
    # Without pyplot there is no display to open and no global state; PNG means the Agg canvas.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))


def _single(draw: Callable[[Axes, _Run], None], run: _Run) -> Figure:
    figure = _figure(7, 4.2)
    draw(figure.subplots(), run)
    return figure


def _overview(run: _Run) -> Figure:
    draws = [_draw_loss]
    if run.num_layers:
        draws.append(_draw_drops)
    if run.train:
        draws.append(_draw_throughput)
    figure = _figure(max(7, 4.6 * len(draws)), 7.4 if run.num_layers else 3.8)
    top: FigureBase = figure
    if run.num_layers:
        (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, hspace=0.04)
        _draw_loads(bottom, run, evenly_spaced(run.num_layers, _OVERVIEW_LAYERS), num_columns=4)
    for axes, draw in zip(top.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
        draw(axes, run)
    return figure


def _load_figure(run: _Run) -> Figure:
    num_columns = min(run.num_layers, 4 if run.num_layers <= 12 else 8)
    num_rows = math.ceil(run.num_layers / num_columns)
    figure = _figure(max(6.5, 2.6 * num_columns + 1), 1 + 2.2 * num_rows)
    _draw_loads(figure, run, range(run.num_layers), num_columns)
    return figure


def _draw_loss(axes: Axes, run: _Run) -> None:
    """Training and held-out loss over steps, with the references as levels."""
    _label(axes, "Loss", "cross-entropy (nats per token)")
    if run.train:
        _draw_curve(axes, run.train, "loss", _BLUE, "training")
    if run.evals:
        steps, losses = column(run.evals, "step"), column(run.evals, "eval_loss")
        axes.plot(steps, losses, "o-", color=_ORANGE, markersize=4, label="held-out")
    for name, nats in run.references.items():
        axes.axhline(nats, color=_GREY, linestyle="--", linewidth=1)
        axes.annotate(
            f"{name} {nats:.2f}",
            (1, nats),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            horizontalalignment="right",
            color=_GREY,
            fontsize=9,
        )
    axes.legend(loc="best")


def _draw_drops(axes: Axes, run: _Run) -> None:
    """Share of assignments dropped, by layer and over all, and of tokens left without expert."""
    _label(axes, "Drops", "dropped (%)")
    if run.num_layers > 1:
        _draw_drops_by_layer(axes, run)
    steps, marker = column(run.train, "step"), _marker(run.train)
    for name, colour, style, label in (
        ("drop_rate", _BLACK, "-", "assignments, all layers"),
        ("token_drop_rate", _ORANGE, "--", "tokens with no expert left"),
    ):
        percent = 100 * column(run.train, name)
        axes.plot(steps, percent, style, color=colour, marker=marker, linewidth=1.8, label=label)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.legend(loc="best")


def _draw_drops_by_layer(axes: Axes, run: _Run) -> None:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    # The last tenth of the map is too light for a line on white.
    colormap = ListedColormap(matplotlib.colormaps[_LAYER_COLOURS](np.linspace(0, 0.9, 256)))
    colours = ScalarMappable(Normalize(0, run.num_layers - 1), colormap)
    steps, marker = column(run.train, "step"), _marker(run.train)
    for layer in range(run.num_layers):
        percent = 100 * column([line["layers"][layer] for line in run.train], "drop_rate")
        colour = colormap(layer / (run.num_layers - 1))
        axes.plot(steps, percent, color=colour, marker=marker, linewidth=0.8, alpha=0.7)
    bar = axes.figure.colorbar(colours, ax=axes, aspect=30, pad=0.02, ticks=_integer_ticks())
    bar.set_label("MoE layer")


def _draw_throughput(axes: Axes, run: _Run) -> None:
    """Tokens per second over steps; the title tells the median and the MFU where known."""
    from matplotlib.ticker import EngFormatter

    title = "Throughput"
    utilisation = column(run.train, "mfu")
    if np.isfinite(utilisation).any():
        title += f" (median MFU {100 * np.nanmedian(utilisation):.1f} %)"
    _label(axes, title, "tokens per second")
    _draw_curve(axes, run.train, "tokens_per_s", _BLUE, "")
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_curve(axes: Axes, lines: Lines, name: str, colour: str, label: str) -> None:
    """A curve; a long one faint, with its running mean on top."""
    steps, values = column(lines, "step"), column(lines, name)
    if len(values) >= _SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        values = running_mean(values, window=2 * (len(values) // 60) + 1)
    axes.plot(steps, values, color=colour, marker=_marker(lines), linewidth=1.6, label=label)


def _draw_loads(figure: FigureBase, run: _Run, layers: Sequence[int], num_columns: int) -> None:
    """A panel per layer: load by expert over steps, all on one colour scale."""
    num_columns = min(num_columns, len(layers))
    num_rows = math.ceil(len(layers) / num_columns)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True)
    loads = [relative_load(run.train, layer) for layer in layers]
    norm, extend = _load_scale(np.stack(loads))
    x_edges = step_edges(column(run.train, "step"))
    y_edges = np.arange(len(loads[0]) + 1) - 0.5
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    for axes, layer, load in zip(grid.flat, layers, loads, strict=False):
        image = axes.pcolorfast(x_edges, y_edges, load, norm=norm, cmap=_LOAD_COLOURS)
        axes.set_title(f"MoE layer {layer}", fontsize=10, fontweight="normal")
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(_integer_ticks(4))
        axes.yaxis.set_major_locator(_integer_ticks(5))
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    bar = figure.colorbar(image, ax=grid, extend=extend, aspect=30, pad=0.02)
    bar.set_label("load of the expert / mean load")


def _load_scale(loads: np.ndarray) -> tuple[Normalize, str]:
    """Colours from 0 over 1 (even) to between 2 and 4; the rare loads beyond share the last."""
    from matplotlib.colors import TwoSlopeNorm

    top = min(4.0, max(2.0, math.ceil(np.quantile(loads, 0.999))))
    return TwoSlopeNorm(vcenter=1, vmin=0, vmax=top), "max" if loads.max() > top else "neither"


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(_integer_ticks())


def _marker(lines: Lines) -> str:
    return "o" if len(lines) == 1 else ""  # a single point has no line to be seen by


def _integer_ticks(most: int = 6) -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True, min_n_ticks=1)
