"""The same variants on recorded routing: where tokens would have gone, with nothing trained."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetrain.errors import UserError
from moetrain.replay import Replay, Setting, replay_all, ways_of
from moetrain.trace import Trace
from sweeping import plan
from sweeping.plan import Refused, Variant
from sweeping.rates import drop_rate_by_layer, drop_rate_of_step, flops, late, rates, slots
from sweeping.table import Row, setting_of


def variants(
    trace: Trace, values: Mapping[str, Sequence[Any]], ep: int | None
) -> tuple[list[Variant], list[Refused]]:
    """The variants that the trace can tell of, and why not of the others."""
    for flag, field in (("routers", "router"), ("experts", "experts")):
        if values.get(field):
            raise UserError(
                f"--{flag} needs trainings: a trace holds what one router chose among its experts; "
                "name a CONFIG instead of a run"
            )
    found, refused = plan.variants(trace.settings, values, trace.settings.train.steps, trace.world)
    able, last = [], trace.record(trace.steps[-1])
    for variant in found:
        try:
            ways_of(last, asked(variant, ep))
            able.append(variant)
        except UserError as error:
            refused.append(Refused(variant.label, str(error)))
    if not able:
        raise UserError("\n".join(f"{one.label}: {one.reason}" for one in refused))
    return able, refused


def asked(variant: Variant, ep: int | None = None) -> Setting:
    """A variant as a question to a trace; `ep` None as it was recorded."""
    moe = variant.config.moe
    assert moe.capacity_factor != "auto", "every variant has a factor of its own"
    return Setting(moe.capacity_factor, moe.drop_policy, moe.group, top_k=moe.top_k, ep=ep)


def rows(trace: Trace, found: Sequence[Variant], ep: int | None) -> list[Row]:
    """One row per variant; loss, speed and memory stay unknown."""
    answers = replay_all(trace, [asked(variant, ep) for variant in found])
    return [_row(variant, answer) for variant, answer in zip(found, answers, strict=True)]


def _row(variant: Variant, answer: Replay) -> Row:
    steps = [step["layers"] for step in answer.steps]
    counted, traffic = late(steps), [step["traffic"] for step in answer.steps]
    cost = flops(counted, slots(counted), variant.config)
    sent = [sum(line["all_to_all_bytes"] for line in lines) for lines in traffic]
    over_time = [(step["step"], drop_rate_of_step(step["layers"])) for step in answer.steps]
    return Row(
        label=variant.label,
        **setting_of(variant),
        rates=rates(counted),
        drop_rate_by_layer=drop_rate_by_layer(counted),
        drop_rate_over_time=over_time,
        useful_flops=cost.useful,
        executed_flops=cost.executed,
        all_to_all_bytes=round(statistics.fmean(sent)),
        straggler_factor=_straggler_factor(answer),
    )


def _straggler_factor(answer: Replay) -> float:
    """Mean over steps and layers."""
    lines = (line for step in answer.steps for line in step["traffic"])
    return statistics.fmean(line["straggler_factor"] for line in lines)


def beside(found: Sequence[Row], variants: Sequence[Variant], own: Variant, run: Path) -> list[Row]:
    """The rows with what their settings would have dropped of what `own` chose, recorded in `run`,
    and, of several ranks, how uneven these would have been.

    A variant of another shape has choices of its own.
    """
    alike = [variant for variant in variants if variant.shape == own.shape]
    trace = Trace.open(run)
    answers = replay_all(trace, [asked(variant) for variant in alike])
    by_label = {variant.label: answer for variant, answer in zip(alike, answers, strict=True)}
    told = []
    for row in found:
        if answer := by_label.get(row.label):
            dropped = rates([step["layers"] for step in answer.steps]).drop_rate
            uneven = _straggler_factor(answer) if trace.settings.parallel.ep > 1 else None
            row = replace(row, replayed_drop_rate=dropped, straggler_factor=uneven)
        told.append(row)
    return told
