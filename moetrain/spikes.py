"""Loss spikes: steps whose loss or gradient norm lies far above that of the steps before.

After the skip-step optimizer of OLMo-core (allenai/OLMo-core, `olmo_core/optim/
skip_step_optimizer.py`): a rolling window of 128 steps, and so many standard deviations above its
mean (6 there, too) as the limit. Otherwise than there:

- A spike stays out of the window, in which it would raise the limit for the next one.
- What lies far below the mean is no spike: a loss may fall.
- 32 steps are enough to judge by, instead of half a window.
- The decision is made on the host, from numbers that all ranks have alike, and skipping is one
  response of several.
- The window is saved with the checkpoint, so a resumed run decides as one that never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

STEPS = 128
"""Steps that the window holds."""
FEWEST = 32
"""Steps that it takes to judge the next one."""
NEW_LEVEL = 8
"""So many spikes in a row that were trained on are no spikes, but what is usual now."""


class Limits(NamedTuple):
    """The largest loss and gradient norm of a step that is no spike."""

    loss: float = math.inf
    grad_norm: float = math.inf

    def admit(self, loss: float, grad_norm: float) -> bool:
        """Whether both are finite and within."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        return finite and loss <= self.loss and grad_norm <= self.grad_norm


FINITE = Limits()
"""No limits but this."""


@dataclass(frozen=True)
class Window:
    """What the last steps were like, spikes left out. Its lists are not changed."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    spikes_in_a_row: int = 0
    """Spikes trained on since the last step that is in the window."""

    def limits(self, sigmas: float) -> Limits:
        """Those of the next step: `sigmas` standard deviations above the mean.

        Without a limit while there are fewer than FEWEST steps, and where `sigmas` is 0.
        """
        if sigmas == 0 or len(self.losses) < FEWEST:
            return FINITE
        return Limits(_limit(self.losses, sigmas), _limit(self.grad_norms, sigmas))

    def after(self, loss: float, grad_norm: float, is_spike: bool) -> Window:
        """The window after a step that was trained on; a skipped one leaves it as it is."""
        if not is_spike:
            return Window(
                [*self.losses, loss][-STEPS:],
                [*self.grad_norms, grad_norm][-STEPS:],
            )
        if self.spikes_in_a_row + 1 == NEW_LEVEL:
            return EMPTY
        return replace(self, spikes_in_a_row=self.spikes_in_a_row + 1)


EMPTY = Window()
"""That of a run's start."""


def _limit(values: Sequence[float], sigmas: float) -> float:
    mean = math.fsum(values) / len(values)
    deviation = math.dist(values, [mean] * len(values)) / math.sqrt(len(values) - 1)
    return mean + sigmas * deviation


def describe(loss: float, grad_norm: float, limits: Limits) -> str:
    """What of a spike lies above its limit, in words."""
    numbers = ("loss", loss, limits.loss), ("gradient norm", grad_norm, limits.grad_norm)
    above = [f"{name} {value:.4g} (limit {limit:.4g})" for name, value, limit in numbers
             if value > limit]  # fmt: skip
    return " and ".join(above)
