"""What was published on capacity factors, beside what a sweep has found.

Switch Transformer: 2101.03961. ST-MoE: 2202.08906.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sweeping.advice import percent
from sweeping.table import Row


class Table(NamedTuple):
    """A table to be shown."""

    title: str
    header: list[str]
    rows: list[list[str]]
    remarks: list[str]
    """Where the sweep differs."""


SWITCH_1: dict[str, dict[float | None, tuple[float, float, int]]] = {
    "MoE, K 2": {2.0: (-1.547, 68.7, 840), 1.25: (-1.559, 80.7, 790), 1.0: (-1.572, 80.1, 860)},
    "Switch, K 1": {2.0: (-1.554, 72.8, 860), 1.25: (-1.553, 65.0, 910), 1.0: (-1.561, 62.8, 1000)},
}
"""128 experts: negative log perplexity after 100k steps, hours to -1.50, examples per second."""
ST_MOE_5: dict[str, dict[float | None, float]] = {
    "with balance loss": {0.75: 10.6, 1.25: 0.3, 2.0: 0.0},
    "without": {0.75: 15.6, 1.25: 2.9, 2.0: 0.4, 4.0: 0.0},
}
"""% of tokens that no expert takes, by training factor, of models that are fine-tuned."""
ST_MOE_8: dict[str, dict[float | None, float]] = {
    "top-1": {0.75: -1.428, 1.0: -1.397, 1.25: -1.378},
    "top-2": {0.75: -1.424, 1.0: -1.392, 1.25: -1.375, 2.0: -1.360},
}
"""32 experts, 100k steps: negative log perplexity, the same factor in training and evaluation."""
ST_MOE_9: dict[str, dict[float | None, float]] = {
    "ST-MoE-L": {1.25: 2.397, 2.0: 2.447},
    "ST-MoE-32B": {1.25: 4.244, 2.0: 4.819},
}
"""Seconds per step."""


def tables(rows: Sequence[Row], own: str, scale: str) -> list[Table]:
    """The published tables with a column of ours, of the variants that differ from the one that is
    labelled `own` in the factor alone. `scale` says how large and how long ours were."""
    base = next(row for row in rows if row.label == own)
    ours = {row.capacity_factor: row for row in rows if _but_factor(row) == _but_factor(base)}
    tables = [_drops(ours, scale)]
    if base.loss is not None:
        tables += [_quality(ours, scale), _speed(ours)]
    return tables


def _but_factor(row: Row) -> tuple[object, ...]:
    return row.router, row.top_k, row.experts, row.drop_policy, row.group


Ours = dict[float | None, Row]


def _drops(ours: Ours, scale: str) -> Table:
    lines = []
    for factor in _factors(ours, *ST_MOE_5.values()):
        known = [_cell(column.get(factor), "{} %") for column in ST_MOE_5.values()]
        mine = [
            _cell(ours.get(factor), lambda row: percent(row.rates.token_drop_rate)),
            _cell(ours.get(factor), lambda row: percent(row.rates.drop_rate)),
        ]
        lines.append([_name(factor), *known, *mine])
    known = [f"ST-MoE Table 5, {name}" for name in ST_MOE_5]
    header = ["factor", *known, "here, tokens", "here, assignments"]
    return Table("Drops in training", header, lines, list(_on_drops(ours, scale)))


def _on_drops(ours: Ours, scale: str) -> Iterator[str]:
    yield (
        "There: tokens that no expert takes, of models with billions of parameters that were "
        f"trained for long and are fine-tuned. Here: {scale}; a token whose other choice found "
        "a slot counts among the assignments alone."
    )
    for name, column in ST_MOE_5.items():
        shared = sorted(f for f in ours if f is not None and f in column)
        more = [f for f in shared if round(100 * ours[f].rates.token_drop_rate, 1) > column[f]]
        if shared:
            named = ", ".join(f"{f:g}" for f in more) or "none of the shared factors"
            yield f"Compared with those {name}, more tokens are dropped here at {named}."
    group = next(iter(ours.values())).group
    yield (
        "A router that was trained for so short is uneven, and a small routing group (here: "
        f"{group}) has fewer tokens to even out."
    )


def _quality(ours: Ours, scale: str) -> Table:
    lines = []
    for factor in _factors(ours, *SWITCH_1.values(), *ST_MOE_8.values()):
        switch = [column.get(factor) for column in SWITCH_1.values()]
        st_moe = [column.get(factor) for column in ST_MOE_8.values()]
        mine = ours.get(factor)
        lines.append(
            [
                _name(factor),
                *(_cell(known, lambda known: f"{-known[0]:.3f}") for known in switch),
                *(_cell(known, lambda known: f"{known[1]:.1f}") for known in switch),
                *(_cell(known, lambda known: f"{-known:.3f}") for known in st_moe),
                _cell(mine, lambda row: _nats(row.own_loss)),
                _cell(mine, lambda row: _nats(row.loss)),
                _cell(mine, lambda row: _nats(row.equal_time_loss)),
            ]
        )
    header = [
        "factor",
        *(f"Switch Table 1, {name}" for name in SWITCH_1),
        *(f"Switch Table 1, {name}: hours to 1.50" for name in SWITCH_1),
        *(f"ST-MoE Table 8, {name}" for name in ST_MOE_8),
        "here, the same factor in evaluation",
        "here, one factor in evaluation",
        "the same at equal time",
    ]
    remarks = [
        "Nats per token, of other text and other tokens: compare the differences in a column. "
        "Switch: 128 experts; ST-MoE: 32 experts, the same factor in training and evaluation (with "
        "1.25 in training and 2.0 in evaluation, top-1 comes to 1.373); both after 100,000 steps.",
        *_on_quality(ours, scale),
    ]
    return Table("Quality", header, lines, remarks)


def _on_quality(ours: Ours, scale: str) -> Iterator[str]:
    pairs = [(a, b) for a, b in ((1.0, 2.0), (1.0, 1.25), (1.25, 2.0)) if a in ours and b in ours]
    if not pairs:
        return
    tight, roomy = pairs[0]
    gaps = [-column[tight][0] + column[roomy][0] for column in SWITCH_1.values()]
    gaps.append(ST_MOE_8["top-2"][roomy] - ST_MOE_8["top-2"][tight])
    mine = (ours[tight].own_loss or 0.0) - (ours[roomy].own_loss or 0.0)
    yield (
        f"From {roomy:g} to {tight:g}, with the same factor in evaluation, the loss rises there by "
        f"{min(gaps):.3f} to {max(gaps):.3f}, here by {mine:.3f} after {scale}."
    )


def _speed(ours: Ours) -> Table:
    columns: dict[str, dict[float | None, float]] = {
        f"Switch Table 1, {name}": {f: 1 / known[2] for f, known in column.items()}
        for name, column in SWITCH_1.items()
    }
    columns |= {f"ST-MoE Table 9, {name}": column for name, column in ST_MOE_9.items()}
    base = ours.get(1.25)
    lines = []
    for factor in _factors(ours, *columns.values()):
        known = [
            _cell(column.get(factor), lambda seconds, at=column[1.25]: f"{seconds / at:.2f}")
            for column in columns.values()
        ]
        mine, step_s = ours.get(factor), None
        if mine is not None and base is not None and base.step_time_s and mine.step_time_s:
            step_s = mine.step_time_s / base.step_time_s
        lines.append([_name(factor), *known, _cell(step_s, "{:.2f}")])
    remarks = [
        "Step time over that at 1.25; Switch's from examples per second (at 2.0, 1.25 and 1.0: "
        "840, 790, 860 with K 2, and 860, 910, 1000 with K 1)."
    ]
    if base is None:
        remarks.append("There was no variant of 1.25 here to compare with.")
    else:
        remarks.append(_on_speed(base))
    return Table("Step time", ["factor", *columns, "here"], lines, remarks)


def _on_speed(base: Row) -> str:
    if base.executed_flops > base.useful_flops:
        share = percent(1 - base.useful_flops / base.executed_flops)
        return (
            "There, slots cost products on accelerators and all-to-all between them. Here "
            f"{share} of the experts' products at 1.25 are of empty rows, and what else a step "
            "does weighs more in a small model."
        )
    return (
        "There, every slot is multiplied and sent. Here a rank multiplies filled rows alone, so a "
        "roomy factor costs little time."
    )


Column = Mapping[float | None, Any]
"""Of a published table, by factor."""


def _factors(ours: Ours, *columns: Column) -> list[float | None]:
    known = {factor for column in columns for factor in column if factor is not None}
    found = known | {factor for factor in ours if factor is not None}
    return [*sorted(found), *([None] if None in ours else [])]


def _name(factor: float | None) -> str:
    return "dropless" if factor is None else f"{factor:g}"


def _cell(value: Any, show: str | Callable[[Any], str]) -> str:
    if value is None:
        return ""
    return show.format(value) if isinstance(show, str) else show(value)


def _nats(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"
