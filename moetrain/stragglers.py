"""Which rank is slow, and why.

Ranks go in step, so each takes about the time of the slowest, and the spread of step times names
nobody. What is measured beside it waits for nobody: how long a rank reads its batches, and how long
it takes for a fixed matrix product.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import NamedTuple, final

import torch

from moetrain.mesh import Mesh

RATIO = 1.5
"""A rank is slow that takes longer than so many times the median ..."""
SHARE = 0.1
"""... and that reads for so much longer than it, in step times ..."""
PRODUCTS = 3
"""Matrix products that are timed together."""
LINES = 3
"""... and is worth a note in so many lines in a row."""


class RankTimes(NamedTuple):
    """Seconds by rank, the same on every rank."""

    step_s: list[float]
    """Of a step."""
    data_s: list[float]
    """In which it read the batches of a step."""
    probe_s: list[float]
    """That a fixed matrix product took; none of a single rank."""


@final
class Probe:
    """A matrix product that needs a fraction of a second and no other rank."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        size, dtype = (4096, torch.bfloat16) if self._is_cuda else (512, torch.float32)
        self._factor = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
        self._product = torch.empty_like(self._factor)
        self._multiply()  # once, for libraries to set up

    def seconds(self) -> float:
        """Mean of `PRODUCTS`, after what the device has yet to do.

        The mean, because other work takes a core for milliseconds at a time: of a few short
        products, it leaves most as they are and makes one long.
        """
        if not self._is_cuda:
            started = time.perf_counter()
            for _ in range(PRODUCTS):
                self._multiply()
            return (time.perf_counter() - started) / PRODUCTS
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(PRODUCTS):
            self._multiply()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / PRODUCTS

    def _multiply(self) -> None:
        torch.mm(self._factor, self._factor, out=self._product)


@final
class RankClock:
    """Brings the times of all ranks together."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._probe = Probe(mesh.device) if mesh.world > 1 else None

    def times(self, step_s: float, data_s: float) -> RankTimes:
        """Of all ranks; this one took `step_s` for a step, `data_s` of it to read. A collective."""
        if self._probe is None:
            return RankTimes([step_s], [data_s], [])
        times_W3 = torch.zeros(self._mesh.world, 3, dtype=torch.float64)
        times_W3[self._mesh.rank] = times_W3.new_tensor([step_s, data_s, self._probe.seconds()])
        return RankTimes(*self._mesh.sum(times_W3.to(self._mesh.device)).T.tolist())


def slow_ranks(times: RankTimes, step_time_s: float) -> dict[int, str]:
    """Why a rank is slow, of each that is. Of two ranks, the median is the faster one."""
    found = {}
    for rank, (seconds, usual) in enumerate(_beside_median(times.probe_s)):
        if seconds > RATIO * usual:
            found[rank] = (
                f"a matrix product takes it {1000 * seconds:.3g} ms, others {1000 * usual:.3g} ms: "
                "its device is throttled, or shared with other work"
            )
    for rank, (seconds, usual) in enumerate(_beside_median(times.data_s)):
        if seconds > RATIO * usual and seconds - usual > SHARE * step_time_s:
            found[rank] = (
                f"it reads its batches for {seconds:.3g} s of a step's {step_time_s:.3g} s, others "
                f"for {usual:.3g} s: look at the disk that holds data.cache"
            )
    return found


def _beside_median(times: Sequence[float]) -> list[tuple[float, float]]:
    usual = median_low(times) if times else 0.0
    return [(seconds, usual) for seconds in times]


@final
class Streaks:
    """Says of a rank once that it is slow, when it has been for LINES lines in a row."""

    def __init__(self) -> None:
        self._lines: Counter[int] = Counter()

    def notes(self, slow: Mapping[int, str]) -> list[str]:
        """What there is to say after another line."""
        self._lines = Counter({rank: self._lines[rank] + 1 for rank in slow})
        due = [rank for rank in slow if self._lines[rank] == LINES]
        return [f"rank {rank} is slow: {slow[rank]}" for rank in due]
