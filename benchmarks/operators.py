"""Which operators a step spends its time in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import record
import torch
from harness import Case
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

STEPS = 5
WARM_UP = 2
SHOWN = 16
"""In a table."""


class Profiled:
    """A contender whose facts are its operators."""

    def __init__(self, build: Callable[[Any, torch.device], Case], cell: Any, device: torch.device):
        self.case, self.device = build(cell, device), device

    def step(self) -> None:
        """As without a profile."""
        self.case.step()

    def facts(self) -> list[dict[str, Any]]:
        """See `operators`."""
        return operators(self.case, self.device)


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
    # An operator has the time of its kernels, which are events of their own, too.
    events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
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


def table(found: list[dict[str, Any]]) -> str:
    """The first `SHOWN` in Markdown."""
    rows = [
        [f"`{operator['name']}`", f"{operator['share']:.1%}", f"{operator['calls']:.0f}"]
        for operator in found[:SHOWN]
    ]
    return record.table(["operator", "own time", "calls a step"], rows)
