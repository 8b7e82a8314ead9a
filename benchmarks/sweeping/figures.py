"""The pictures of the HTML report, drawn by plotly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sweeping.look import NAMES, look
from sweeping.table import Curve, Losses, Row, front

HEIGHT = 430


def trade(rows: Sequence[Row]) -> go.Figure:
    """Drops against speed against loss, two at a time; those that no other beats are filled."""
    unbeaten = {row.label for row in front(rows)}
    figure = make_subplots(rows=1, cols=3, horizontal_spacing=0.09)
    panels: list[tuple[Callable[[Row], Any], Callable[[Row], Any]]] = [
        (lambda row: 100 * row.rates.drop_rate, lambda row: row.tokens_per_s),
        (lambda row: 100 * row.rates.drop_rate, lambda row: row.loss),
        (lambda row: row.loss, lambda row: row.tokens_per_s),
    ]
    for number, row in enumerate(rows):
        style = look(number)
        symbol = style.symbol if row.label in unbeaten else f"{style.symbol}-open"
        for column, (x, y) in enumerate(panels, start=1):
            dot = go.Scatter(
                x=[x(row)],
                y=[y(row)],
                name=row.label,
                legendgroup=row.label,
                showlegend=column == 1,
                mode="markers",
                marker={"color": style.colour, "size": 12, "symbol": symbol},
            )
            figure.add_trace(dot, row=1, col=column)
    for column, (x, y) in enumerate((("drops", "speed"), ("drops", "loss"), ("loss", "speed")), 1):
        figure.update_xaxes(title=NAMES[x], row=1, col=column)
        figure.update_yaxes(title=NAMES[y], row=1, col=column)
    return _finished(figure)


def drops_over_time(rows: Sequence[Row]) -> go.Figure:
    """Of every variant, the share dropped in each step."""
    curves = [[(x, 100 * y) for x, y in row.drop_rate_over_time] for row in rows]
    return _lines(rows, curves, "optimizer step", NAMES["drops"])


def drops_by_layer(rows: Sequence[Row]) -> go.Figure:
    """Of every variant, the share dropped in each layer."""
    curves = [[(n, 100 * y) for n, y in enumerate(row.drop_rate_by_layer)] for row in rows]
    figure = _lines(rows, curves, "MoE layer", NAMES["drops"], marked=True)
    figure.update_xaxes(tickmode="linear" if len(curves[0]) <= 20 else "auto")
    return figure


def padding(rows: Sequence[Row]) -> go.Figure:
    """Empty slots against drops: what a factor saves and costs."""
    figure = go.Figure()
    for number, row in enumerate(rows):
        style = look(number)
        point = [100 * row.rates.drop_rate], [100 * row.rates.padding_waste]
        figure.add_trace(_dot(row, *point, style.colour, style.symbol))
    figure.update_xaxes(title=NAMES["drops"])
    figure.update_yaxes(title=NAMES["padding"])
    return _finished(figure)


def loss_by_step(rows: Sequence[Row], found: Losses) -> go.Figure:
    """Held-out loss at equal steps."""
    return _lines(rows, found.by_step, "optimizer step", _above(found), marked=True)


def loss_by_time(rows: Sequence[Row], found: Losses) -> go.Figure:
    """Held-out loss at equal time."""
    x = "seconds of training since the start"
    return _lines(rows, found.by_time, x, _above(found), marked=True)


def _above(found: Losses) -> str:
    return f"held-out loss above that of {found.of} (nats per token)"


def replayed(rows: Sequence[Row]) -> go.Figure:
    """What a variant drops once it trains, against the same setting on recorded routing."""
    figure = go.Figure()
    for number, row in enumerate(rows):
        if row.replayed_drop_rate is not None:
            style = look(number)
            point = [100 * row.replayed_drop_rate], [100 * row.rates.drop_rate]
            figure.add_trace(_dot(row, *point, style.colour, style.symbol))
    most = max(
        [row.rates.drop_rate for row in rows] + [row.replayed_drop_rate or 0 for row in rows]
    )
    ends = [0, 100 * most]
    line = {"dash": "dot", "color": "#8c8c8c"}
    figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line, name="equal"))
    figure.update_xaxes(title="dropped of recorded choices (%)")
    figure.update_yaxes(title="dropped in training (%)")
    return _finished(figure)


def _dot(row: Row, x: list[float], y: list[float], colour: str, symbol: str) -> go.Scatter:
    marker = {"color": colour, "size": 13, "symbol": symbol}
    return go.Scatter(x=x, y=y, name=row.label, mode="markers", marker=marker)


def _lines(
    rows: Sequence[Row], curves: Sequence[Curve], x: str, y: str, marked: bool = False
) -> go.Figure:
    figure = go.Figure()
    for number, (row, curve) in enumerate(zip(rows, curves, strict=True)):
        style = look(number)
        figure.add_trace(
            go.Scatter(
                x=[point[0] for point in curve],
                y=[point[1] for point in curve],
                name=row.label,
                mode="lines+markers" if marked or len(curve) == 1 else "lines",
                line={"color": style.colour, "dash": style.dash, "width": 2},
                marker={"symbol": style.symbol, "size": 8},
            )
        )
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y)
    return _finished(figure)


def _finished(figure: go.Figure) -> go.Figure:
    """Without a ground of its own, so that the page's shows; the page sets the colour of text."""
    clear = "rgba(0,0,0,0)"
    return figure.update_layout(
        height=HEIGHT,
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hovermode="closest",
    )
