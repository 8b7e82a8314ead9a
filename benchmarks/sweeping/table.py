"""From what was seen of every variant to a row of numbers, and what follows from the rows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from harness import Spread, spread

from sweeping.live import Live, Step, Trail
from sweeping.plan import AXES, Refused, Variant
from sweeping.rates import Rates, drop_rate_by_layer, drop_rate_of_step, flops, late, rates

Curve = Sequence[tuple[float, float]]
"""Points, the first by x first."""


@dataclass(frozen=True)
class Row:
    """One variant. Rates are those of the second half of its steps, all repeats together; None is
    what was not measured: on a recorded trace nothing is trained."""

    label: str
    router: str
    top_k: int
    experts: int
    drop_policy: str
    group: str | int
    capacity_factor: float | None
    """None: dropless."""
    rates: Rates
    drop_rate_by_layer: list[float]
    drop_rate_over_time: Curve
    """By optimizer step."""
    useful_flops: float
    """Of the experts' products in an optimizer step, forward and backward, of filled rows."""
    executed_flops: float
    """The same of all rows that are multiplied."""
    all_to_all_bytes: int
    """That a rank sends in an optimizer step."""
    straggler_factor: float | None = None
    """Rows of the rank with most over the mean of ranks, on recorded routing."""
    step_time_s: float | None = None
    turn_ratios: list[float] = field(default_factory=list)
    """Its step time over that of the config's own setting, turn by turn."""
    tokens_per_s: float | None = None
    held_bytes: int | None = None
    """Weights and moments, on the rank that holds most."""
    step_bytes: int | None = None
    """Peak memory of a step beyond what is there before it, on the rank that takes most."""
    losses: list[float] = field(default_factory=list)
    """Held-out loss after the last step at the shared evaluation factor, repeat by repeat, in nats
    per token."""
    own_loss: float | None = None
    """The same with the training factor in evaluation, mean of the repeats."""
    equal_time_loss: float | None = None
    """Held-out loss in the time that the fastest variant takes to its end."""
    eval_drop_rate: float | None = None
    loss_over_time: Curve = field(default_factory=list)
    """Held-out loss by optimizer step, mean of the repeats."""
    training_loss: Curve = field(default_factory=list)
    """By optimizer step, mean of the repeats."""
    bad_steps: int = 0
    """Steps whose loss or gradient was not finite, all repeats together."""
    replayed_drop_rate: float | None = None
    """On the routing that the own setting had in the second half of the first repeat."""

    @property
    def loss(self) -> float | None:
        """Held-out loss at equal steps, mean of the repeats; NaN where one diverged."""
        return statistics.fmean(self.losses) if self.losses else None

    @property
    def time_ratio(self) -> Spread | None:
        """Median and range of the turns' ratios."""
        return spread(self.turn_ratios) if self.turn_ratios else None


class Sweep(NamedTuple):
    """All that is told of a sweep."""

    name: str
    """Of the run that was swept."""
    what: str
    """What was done, in sentences."""
    scale: str
    """How large and how long, in a few words."""
    rows: list[Row]
    own: str
    """The variant that others are compared with: the config's own setting, or the first."""
    refused: list[Refused]
    config: dict[str, Any]


def live_rows(variants: Sequence[Variant], seen: Sequence[Live], own: Variant) -> list[Row]:
    """One row per variant. Times are the own setting's, times the ratio of a turn to its."""
    reference = seen[variants.index(own)]
    base_s = statistics.median(_turns(reference))
    ratios = [_ratios(live, reference) for live in seen]
    times = [base_s * statistics.median(turns) for turns in ratios]
    steps = max(len(trail.steps) for live in seen for trail in live.trails)
    sound = [time_s for live, time_s in zip(seen, times, strict=True) if _is_sound(live)]
    budget_s = steps * min(sound or times)
    return [
        _live_row(variant, live, turns, time_s, budget_s)
        for variant, live, turns, time_s in zip(variants, seen, ratios, times, strict=True)
    ]


def _is_sound(live: Live) -> bool:
    """Whether it did not diverge: steps that are not taken cost less."""
    return all(math.isfinite(trail.held_out[-1].loss) for trail in live.trails)


def _live_row(
    variant: Variant, live: Live, ratios: list[float], time_s: float, budget_s: float
) -> Row:
    config, trails = variant.config, live.trails
    steps = [step for trail in trails for step in late(trail.steps)]
    counted = [step.layers for step in steps]
    cost = flops(counted, [step.executed_rows for step in steps], config)
    held_out: list[Curve] = [[(one.step, one.loss) for one in trail.held_out] for trail in trails]
    loss_over_time = _mean_curve(held_out)
    start = loss_over_time[0][0]
    own = [trail.own.loss for trail in trails if trail.own is not None]
    return Row(
        label=variant.label,
        **setting_of(variant),
        rates=rates(counted),
        drop_rate_by_layer=drop_rate_by_layer(counted),
        drop_rate_over_time=_step_curve(trails, lambda step: drop_rate_of_step(step.layers)),
        useful_flops=cost.useful,
        executed_flops=cost.executed,
        all_to_all_bytes=live.facts.all_to_all_bytes,
        step_time_s=time_s,
        turn_ratios=ratios,
        tokens_per_s=config.train.global_batch * config.data.seq_len / time_s,
        held_bytes=live.facts.held_bytes,
        step_bytes=live.facts.step_bytes,
        losses=[trail.held_out[-1].loss for trail in trails],
        own_loss=statistics.fmean(own),
        equal_time_loss=at(loss_over_time, start + budget_s / time_s),
        eval_drop_rate=statistics.fmean(trail.held_out[-1].drop_rate for trail in trails),
        loss_over_time=loss_over_time,
        training_loss=_step_curve(trails, lambda step: step.loss),
        bad_steps=sum(trail.bad_steps for trail in trails),
    )


def setting_of(variant: Variant) -> dict[str, Any]:
    """What a row says of a variant's setting."""
    return {field: getattr(variant.config.moe, field) for field in AXES}


def _turns(live: Live) -> list[float]:
    return [seconds for trail in live.trails for seconds in trail.turns]


def _ratios(live: Live, reference: Live) -> list[float]:
    """Of the turns that both had: whoever diverges has no more."""
    pairs = zip(live.trails, reference.trails, strict=True)
    return [a / b for one, other in pairs for a, b in zip(one.turns, other.turns, strict=False)]


def _step_curve(trails: Sequence[Trail], value: Callable[[Step], float]) -> Curve:
    return _mean_curve([[(step.step, value(step)) for step in trail.steps] for trail in trails])


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of some curves, as far as all of them go."""
    return [
        (points[0][0], statistics.fmean(y for _, y in points))
        for points in zip(*curves, strict=False)
    ]


def at(curve: Curve, x: float) -> float:
    """The value between the points of a curve, by a straight line; beyond them that of an end."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x < x1:
            return y0 + (y1 - y0) * max(0.0, x - x0) / (x1 - x0)
    return curve[-1][1]


class Losses(NamedTuple):
    """Curves that can be told apart: held-out loss above that of one variant."""

    of: str
    """The variant that they are compared with."""
    by_step: Sequence[Curve]
    """At equal steps."""
    by_time: Sequence[Curve]
    """At equal seconds of training since the start, until the first is done."""


def losses(rows: Sequence[Row], own: str) -> Losses:
    """Of every variant, at each of its evaluations."""
    base = [row.label for row in rows].index(own)
    by_step = [row.loss_over_time for row in rows]
    start = by_step[base][0][0]
    by_time = [
        [((x - start) * (row.step_time_s or 0.0), y) for x, y in curve]
        for row, curve in zip(rows, by_step, strict=True)
    ]
    end_s = min(curve[-1][0] for curve in by_time)
    by_time = [
        [*(point for point in curve if point[0] < end_s), (end_s, at(curve, end_s))]
        for curve in by_time
    ]
    return Losses(own, _above(by_step, base), _above(by_time, base))


def _above(curves: Sequence[Curve], base: int) -> Sequence[Curve]:
    return [[(x, y - at(curves[base], x)) for x, y in curve] for curve in curves]


def noise(rows: Sequence[Row]) -> float | None:
    """Standard error of the difference between two variants' losses; None of a single repeat.

    What remains of the losses once every variant has its mean and every repeat its own, as in a
    two-way analysis of variance: repeats read different text, which moves all variants alike.
    """
    table = [row.losses for row in rows if all(map(math.isfinite, row.losses))]
    repeats = len(table[0]) if table else 0
    if len(table) < 2 or repeats < 2:
        return None
    means = [statistics.fmean(losses) for losses in table]
    of_repeat = [statistics.fmean(column) for column in zip(*table, strict=True)]
    overall = statistics.fmean(means)
    rest = sum(
        (loss - mean - of_repeat[repeat] + overall) ** 2
        for losses, mean in zip(table, means, strict=True)
        for repeat, loss in enumerate(losses)
    )
    variance = rest / ((len(table) - 1) * (repeats - 1))
    return math.sqrt(2 * variance / repeats)


def time_noise(row: Row, other: Row) -> float:
    """Standard error of one variant's step time over another's, told from the turns of both; 0 of
    a single one."""
    pairs = zip(row.turn_ratios, other.turn_ratios, strict=True)
    ratios = [mine / theirs for mine, theirs in pairs]
    return statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0


def front(rows: Sequence[Row]) -> list[Row]:
    """The variants that no other beats: at least as good in drops, step time and loss, and better
    in one. Without trainings, in drops and empty slots."""
    scores = [(row, _score(row)) for row in rows]
    return [
        row
        for row, mine in scores
        if all(map(math.isfinite, mine)) and not any(_beats(other, mine) for _, other in scores)
    ]


def _score(row: Row) -> tuple[float, ...]:
    if row.loss is None or row.step_time_s is None:
        return row.rates.drop_rate, row.rates.padding_waste
    return row.rates.drop_rate, row.step_time_s, row.loss


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
