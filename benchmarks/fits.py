"""Lines through measurements: how cost grows with size, and what of a message is latency."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Student's t for 95 % in the middle, by degrees of freedom from 1; beyond the last, the normal's.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T95 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
_NORMAL95 = 1.960


class Exponent(NamedTuple):
    """p in cost ∝ size^p, with the range that holds it with 95 % confidence."""

    value: float
    low: float
    high: float

    def show(self) -> str:
        """As in a table: exponent (low to high)."""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def exponent(sizes: Sequence[float], rounds: Sequence[Sequence[float]]) -> Exponent:
    """The slope of log cost over log size: the mean of the rounds, each fitted by itself.

    `rounds` holds the costs at every size, round by round. The confidence range is that of the mean
    (Student's t): it tells of noise between rounds, not of how straight the line is. A single round
    has no range (NaN).
    """
    slopes = [_slope(np.log(sizes), np.log(costs)) for costs in rounds]
    mean, degrees = statistics.mean(slopes), len(slopes) - 1
    if degrees == 0:
        return Exponent(mean, math.nan, math.nan)
    quantile = _T95[degrees - 1] if degrees <= len(_T95) else _NORMAL95
    half = quantile * statistics.stdev(slopes) / math.sqrt(len(slopes))
    return Exponent(mean, mean - half, mean + half)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


class Transport(NamedTuple):
    """seconds = latency + bytes / bandwidth."""

    latency: float
    """Seconds of a message without bytes."""
    bandwidth: float
    """Bytes per second of one without end."""
    off: float
    """How far the worst measurement is from the line, as a share of itself."""

    @property
    def half(self) -> float:
        """Bytes of a message that gets half the bandwidth."""
        return self.latency * self.bandwidth


def transport(num_bytes: Sequence[float], seconds: Sequence[float]) -> Transport:
    """The line with the least squares of deviations, each as a share of what was measured.

    So that short messages, which tell of latency, count as much as long ones. A latency is at least
    0, and the bandwidth infinite where more bytes take no more time.
    """
    size, time = np.asarray(num_bytes, dtype=float), np.asarray(seconds, dtype=float)
    columns = np.stack([1 / time, size / time], axis=1)
    (latency, per_byte), *_ = np.linalg.lstsq(columns, np.ones_like(time), rcond=None)
    if latency < 0:  # the best line through the origin
        latency, per_byte = 0.0, float((size / time).sum() / ((size / time) ** 2).sum())
    off = np.abs((latency + size * per_byte) / time - 1).max()
    return Transport(float(latency), float(1 / per_byte) if per_byte > 0 else math.inf, float(off))
