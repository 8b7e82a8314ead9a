"""Where a step spends its time: its operators, and of moetrain's step its phases."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import operators
import torch
from harness import synchronize
from torch import Tensor

from moetrain.optim import StepOutcome
from stepping.own import OwnStep


class Profiled(operators.Profiled):
    """A contender whose facts are where its time goes."""

    def facts(self) -> dict[str, Any]:
        """Operators, the costliest first, and the phases of moetrain's step."""
        found = phases(self.case, self.device) if isinstance(self.case, OwnStep) else None
        return {"operators": super().facts(), "phases": found}


class _Timed:
    """An engine that notes when it is called."""

    def __init__(self, engine: Any, device: torch.device):
        self._engine, self._device = engine, device
        self.model = engine.model
        self.seconds = {"backward": 0.0, "update": 0.0}

    def backward(self, loss: Tensor, last: bool) -> None:
        self._time("backward", lambda: self._engine.backward(loss, last))

    def step(self, *arguments: Any) -> StepOutcome:
        return self._time("update", lambda: self._engine.step(*arguments))

    def state(self) -> dict[str, Tensor]:
        return self._engine.state()

    def _time(self, phase: str, work: Callable[[], Any]) -> Any:
        synchronize(self._device.type)
        started = time.perf_counter()
        result = work()
        synchronize(self._device.type)
        self.seconds[phase] += time.perf_counter() - started
        return result


def phases(case: OwnStep, device: torch.device) -> dict[str, float]:
    """Shares of moetrain's step: forward (all that is not one of the others), backward, update."""
    run, shares = case.run, []
    for number in range(operators.WARM_UP + operators.STEPS):
        timed = _Timed(run.engine, device)
        case.run = replace(run, engine=timed)
        synchronize(device.type)
        started = time.perf_counter()
        case.step()
        whole = time.perf_counter() - started
        forward = whole - sum(timed.seconds.values())
        parts = {"forward": forward, **timed.seconds}
        if number >= operators.WARM_UP:
            shares.append({name: seconds / whole for name, seconds in parts.items()})
    case.run = run
    return {name: statistics.median(share[name] for share in shares) for name in shares[0]}
