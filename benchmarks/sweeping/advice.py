"""Which variant to take, and why, in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sweeping.table import Row, noise, time_noise

FEW_DROPS = 0.01
"""Share of assignments whose loss is taken for harmless where no loss was measured."""
MANY_DROPS = 0.05
"""Share above which a short training says too little of what drops cost."""
EQUALLY_FAST = 0.02
"""Difference in step time that is none."""
TOLERANCE = 0.005
"""Share of the loss that is none, where a single repeat tells nothing of noise."""

LIVE_RULE = (
    "Of the variants whose held-out loss is the lowest, or above it by no more than noise, the "
    f"fastest is taken. Where others are within {100 * EQUALLY_FAST:.0f} % of its step time, or "
    "slower by no more than noise, it is the one of them that drops least."
)
TRACE_RULE = (
    f"Nothing was trained, so the fewest slots that drop at most {100 * FEW_DROPS:.0f} % of the "
    "assignments are taken, or else what drops least. What it costs in loss and time, a live sweep "
    "tells."
)


class Advice(NamedTuple):
    """What to take."""

    pick: str | None
    """Label of a variant; None where none can be recommended."""
    headline: str
    reasons: list[str]
    """Sentences on the alternatives, and on what to be careful about."""
    rule: str


def advise(rows: Sequence[Row]) -> Advice:
    """Recommend one of the variants, which were all trained or none of them."""
    if rows[0].loss is None:
        return _on_trace(rows)
    sound = [row for row in rows if math.isfinite(_loss(row))]
    diverged = [
        f"{row.label} diverged: its loss or gradient was not finite."
        for row in rows
        if row not in sound
    ]
    if not sound:
        headline = "None: every variant diverged. Try a lower train.lr or more warm-up."
        return Advice(None, headline, diverged, LIVE_RULE)
    best, margin = min(sound, key=_loss), _margin(sound)
    equal = [row for row in sound if _loss(row) - _loss(best) <= margin]
    fastest = min(equal, key=_time)
    as_fast = [row for row in equal if _is_as_fast(row, fastest)]
    pick = min(as_fast, key=lambda row: (row.rates.drop_rate, _time(row)))
    reasons = [_on_noise(sound, margin), *_on_others(sound, pick, best, margin)]
    reasons += [*_cautions(pick, equal), *diverged]
    return Advice(pick.label, _headline(pick, best, sound), reasons, LIVE_RULE)


def _on_trace(rows: Sequence[Row]) -> Advice:
    enough = [row for row in rows if row.rates.drop_rate <= FEW_DROPS]
    limited = [row for row in enough if row.capacity_factor is not None]
    if limited:
        pick = min(limited, key=lambda row: row.rates.effective_capacity_factor)
    else:
        pick = min(rows, key=lambda row: (row.rates.drop_rate, row.rates.padding_waste))
    headline = (
        f"{pick.label}: {percent(pick.rates.drop_rate)} of assignments dropped, "
        f"{percent(pick.rates.padding_waste)} of the slots empty."
    )
    others = [
        f"{row.label} drops {percent(row.rates.drop_rate)}, with "
        f"{percent(row.rates.padding_waste)} of the slots empty."
        for row in rows
        if row is not pick
    ]
    return Advice(pick.label, headline, others, TRACE_RULE)


def _headline(pick: Row, best: Row, rows: Sequence[Row]) -> str:
    """As "1.25: 0.4 % of assignments dropped, 3 % slower than 1.0, loss as at 2.0."."""
    parts = [f"{percent(pick.rates.drop_rate)} of assignments dropped"]
    others = [row for row in rows if row is not pick]
    if others:
        parts.append(_compared(pick, min(others, key=_time)))
    if pick is not best:
        parts.append(f"loss as at {best.label}")
    elif others:
        parts.append("the lowest loss")
    return f"{pick.label}: {', '.join(parts)}."


def _on_noise(rows: Sequence[Row], margin: float) -> str:
    if len(rows) == 1:
        return "There was no other variant to compare it with."
    if noise(rows) is None:
        return (
            f"With a single repeat nothing is known of noise; losses within {margin:.4f} nats per "
            f"token ({100 * TOLERANCE:g} %) count as equal. Try --repeats 2."
        )
    return (
        f"Losses within {margin:.4f} nats per token count as equal: twice the standard error of a "
        "difference between two variants, told from the repeats."
    )


def _on_others(rows: Sequence[Row], pick: Row, best: Row, margin: float) -> Iterator[str]:
    for row in rows:
        if row is pick:
            continue
        behind = _loss(row) - _loss(best)
        told = f"{row.label}: {percent(row.rates.drop_rate)} dropped, {_compared(row, pick)}"
        if behind > margin:
            yield f"{told}, loss {behind:.4f} above that of {best.label}, more than noise."
        elif row is best:
            yield f"{told}, the lowest loss."
        else:
            yield f"{told}, loss the same but for noise."


def _cautions(pick: Row, equal: Sequence[Row]) -> Iterator[str]:
    if pick.rates.drop_rate <= MANY_DROPS:
        return
    yield (
        f"{percent(pick.rates.drop_rate)} is much to drop, and short trainings show little of what "
        "drops cost in long ones."
    )
    roomier = [row for row in equal if row.rates.drop_rate <= MANY_DROPS]
    if roomier:
        other = min(roomier, key=_time)
        yield f"To be on the safe side take {other.label}: {_compared(other, pick)}."


def _is_as_fast(row: Row, fastest: Row) -> bool:
    """Whether it is hardly slower, or not for sure."""
    return _time(row) / _time(fastest) - 1 <= max(EQUALLY_FAST, 2 * time_noise(row, fastest))


def _margin(rows: Sequence[Row]) -> float:
    error = noise(rows)
    return TOLERANCE * min(map(_loss, rows)) if error is None else 2 * error


def _compared(row: Row, other: Row) -> str:
    change = 100 * (_time(row) / _time(other) - 1)
    if abs(change) < 0.5:
        return f"as fast as {other.label}"
    return f"{abs(change):.0f} % {'slower' if change > 0 else 'faster'} than {other.label}"


def percent(share: float) -> str:
    """A share as text: two digits where it is small."""
    value = 100 * share
    if value == 0:
        return "0 %"
    return "under 0.01 %" if value < 0.01 else f"{value:.{2 if value < 0.1 else 1}f} %"


def _loss(row: Row) -> float:
    assert row.loss is not None
    return row.loss


def _time(row: Row) -> float:
    assert row.step_time_s is not None
    return row.step_time_s
