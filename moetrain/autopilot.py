"""Capacity autopilot: of each layer the capacity factor that keeps its drops within a target.

What a factor drops follows from how often each expert is asked in each routing group, and that is
known whatever the layer ran with. So every step tells exactly, in integers that no layout changes
(unless a group is a micro-batch), what each of FACTORS would have dropped; nothing is tried out,
and nothing is estimated. Every STEPS steps a layer looks at their sums:

- Where its factor dropped more than the target, it goes up at once, to the smallest that would not
  have, or to the largest.
- Where the next smaller one would have dropped no more than MARGIN of the target, it goes down, by
  that one. The margin keeps a layer near the limit from going back and forth.

It begins with the largest: a young router is far from even, and a run that does not fit into memory
with the largest factor ends at its first step rather than days later.

The sums are part of a run's position and saved with it, so a resumed run decides as one that never
stopped. Steps that were skipped are not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0, 4.0)
"""What a layer may run with, few enough for a compiled graph each. Between 1 and 2 a quarter more
about halves the drops. Below 1 there is room where second choices are not sampled, or for a target
that is not small; past 4 a layer should rather be balanced than given more slots."""
STEPS = 16
"""Steps that a decision looks back on."""
MARGIN = 0.75
"""Share of the target up to which a smaller factor may drop. What 16 steps drop varies by a tenth
or so, even of small batches, so what was within three quarters of the target mostly stays within
it."""


@dataclass(frozen=True)
class Autopilot:
    """Where it stands, the same on every rank. Its lists are not changed."""

    factors: list[float] = field(default_factory=list)
    """Of every layer; empty before the first step, when all have the largest."""
    steps: int = 0
    """That are in the sums."""
    sums: list[list[int]] = field(default_factory=list)
    """Of every layer: assignments, then how many of them each of FACTORS would have dropped."""

    def of_layers(self, num_layers: int) -> list[float]:
        """The factors that so many layers run their next step with."""
        return self.factors or [FACTORS[-1]] * num_layers

    def after(self, tally: list[list[int]], target: float) -> Autopilot:
        """Where it stands after a step with this tally, of the form of `sums`; an empty one leaves
        it as it is."""
        if not tally:
            return self
        sums = _added(self.sums, tally) if self.steps else tally
        steps, factors = self.steps + 1, self.of_layers(len(tally))
        if steps < STEPS:
            return Autopilot(factors, steps, sums)
        layers = zip(factors, sums, strict=True)
        return Autopilot([decide(factor, of[0], of[1:], target) for factor, of in layers])


def _added(one: list[list[int]], other: list[list[int]]) -> list[list[int]]:
    return [list(map(sum, zip(*rows, strict=True))) for rows in zip(one, other, strict=True)]


OFF = Autopilot()
"""That of a run's start, and of a run without."""


def decide(factor: float, assigned: int, dropped: Sequence[int], target: float) -> float:
    """The factor that comes after `factor` where so many assignments were made, and each of FACTORS
    would have dropped so many of them."""
    here, limit = FACTORS.index(factor), target * assigned
    if dropped[here] > limit:
        fitting = (f for f, lost in zip(FACTORS, dropped, strict=True) if lost <= limit)
        return next(fitting, FACTORS[-1])
    if here > 0 and dropped[here - 1] <= MARGIN * limit:
        return FACTORS[here - 1]
    return factor


def changes(before: Autopilot, after: Autopilot) -> str:
    """Which layers have another factor than before, in words and ASCII; empty where none has."""
    moves: dict[tuple[float, float], list[str]] = {}
    old = before.of_layers(len(after.factors))
    for layer, move in enumerate(zip(old, after.factors, strict=True)):
        moves.setdefault(move, []).append(str(layer))
    return "; ".join(
        f"{was} -> {now} in MoE layer{'s' * (len(layers) > 1)} {', '.join(layers)}"
        for (was, now), layers in moves.items()
        if was != now
    )
