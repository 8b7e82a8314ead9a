"""Where a step spends its time: its operators, and of moetrain's step its phases."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from harness import Case
from torch import Tensor
from torch.profiler import ProfilerActivity

from moetrain.optim import StepOutcome
from stepping.own import OwnStep
from stepping.shapes import Cell

STEPS = 5
WARM_UP = 2


class Profiled:
    """A contender whose facts are where its time goes."""

    def __init__(
        self, build: Callable[[Cell, torch.device], Case], cell: Cell, device: torch.device
    ):
        self.case, self.device = build(cell, device), device

    def step(self) -> None:
        """As without a profile."""
        self.case.step()

    def facts(self) -> dict[str, Any]:
        """Operators, the costliest first, and the phases of moetrain's step."""
        case, device = self.case, self.device
        found = phases(case, device) if isinstance(case, OwnStep) else None
        return {"operators": operators(case, device), "phases": found}


def operators(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Name, share of the time of all operators that is its own, and calls per step, of those with
    a thousandth of the time."""
    for _ in range(WARM_UP):
        case.step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            case.step()
        if on_gpu:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    own: Callable[[Any], float] = (
        (lambda event: event.self_device_time_total)
        if on_gpu
        else (lambda event: event.self_cpu_time_total)
    )
    total = sum(own(event) for event in events)
    found = [
        {"name": event.key, "share": own(event) / total, "calls": event.count / STEPS}
        for event in events
        if own(event) >= 0.001 * total
    ]
    return sorted(found, key=lambda operator: -operator["share"])


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
        _wait(self._device)
        started = time.perf_counter()
        result = work()
        _wait(self._device)
        self.seconds[phase] += time.perf_counter() - started
        return result


def phases(case: OwnStep, device: torch.device) -> dict[str, float]:
    """Shares of moetrain's step: forward (all that is not one of the others), backward, update."""
    run, shares = case.run, []
    for number in range(WARM_UP + STEPS):
        timed = _Timed(run.engine, device)
        case.run = replace(run, engine=timed)
        _wait(device)
        started = time.perf_counter()
        case.step()
        whole = time.perf_counter() - started
        forward = whole - sum(timed.seconds.values())
        parts = {"forward": forward, **timed.seconds}
        if number >= WARM_UP:
            shares.append({name: seconds / whole for name, seconds in parts.items()})
    case.run = run
    return {name: statistics.median(share[name] for share in shares) for name in shares[0]}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
