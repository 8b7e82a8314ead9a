"""The lines of a run as arrays to draw. No drawing here.

A null of metrics.jsonl (NaN, infinity, unknown) is NaN, and so is a field that a line lacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Lines = Sequence[Mapping[str, Any]]


class History(NamedTuple):
    """What a run logged."""

    name: str
    train: Lines
    evals: Lines
    references: Mapping[str, float]
    """Losses to compare with, in nats per token."""

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.train[-1]["layers"]) if self.train else 0

    @property
    def num_choices(self) -> int:
        """Choices per token in the ledger."""
        return len(self.train[-1]["layers"][0]["drop_rate_by_choice"]) if self.num_layers else 0

    @property
    def steps(self) -> np.ndarray:
        """The step of every training line."""
        return column(self.train, "step")


def history(name: str, lines: Lines, byte_entropy: Mapping[str, float]) -> History:
    """Sort the lines of a run; `byte_entropy` names references in nats per byte."""
    evals = [line for line in lines if "eval_loss" in line]
    train = [line for line in lines if "loss" in line]
    return History(name, train, evals, per_token(byte_entropy, evals))


def per_token(byte_entropy: Mapping[str, float], evals: Lines) -> dict[str, float]:
    """Nats per byte to nats per token, by the bytes per token of the last evaluation."""
    for line in reversed(evals):
        if line["eval_loss"] and line["eval_nats_per_byte"]:
            bytes_per_token = line["eval_loss"] / line["eval_nats_per_byte"]
            return {name: nats * bytes_per_token for name, nats in byte_entropy.items()}
    return {}


def column(lines: Lines, name: str) -> np.ndarray:
    """One field of every line, float64."""
    values = (line.get(name) for line in lines)
    return np.array([math.nan if value is None else value for value in values], float)


def by_layer(lines: Lines, name: str) -> np.ndarray:
    """(MoE layers, lines): one figure of every layer."""
    num_layers = len(lines[-1]["layers"])
    return np.stack(
        [column([line["layers"][index] for line in lines], name) for index in range(num_layers)]
    )


def drop_rate_by_choice(lines: Lines) -> np.ndarray:
    """(choices, lines): the mean over the MoE layers of each choice's drop rate.

    As many choices as at the end; NaN where a line has fewer, since a run may be continued with
    another moe.top_k.
    """
    num_choices = len(lines[-1]["layers"][0]["drop_rate_by_choice"])
    rates = np.full((len(lines), num_choices), math.nan)
    for row, line in zip(rates, lines, strict=True):
        means = np.mean([layer["drop_rate_by_choice"] for layer in line["layers"]], axis=0)
        row[: len(means)] = means[:num_choices]
    return rates.T


def spill_rate(lines: Lines) -> np.ndarray:
    """(lines): Σ spilled / Σ assigned over the MoE layers; 0 without assignments."""
    spilled, assigned = (by_layer(lines, name).sum(axis=0) for name in ("spilled", "assigned"))
    return np.divide(spilled, assigned, out=np.zeros_like(spilled), where=assigned > 0)


def relative_load(lines: Lines, layer: int) -> np.ndarray:
    """(experts, lines): load of one layer's experts over their mean; 0 without assignments."""
    load = np.array([line["layers"][layer]["load"] for line in lines], float).T
    mean = load.mean(axis=0)
    return np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the `window` (odd) values around each; fewer at the ends, NaN left out."""
    known = np.isfinite(values)
    padded = np.pad(np.where(known, values, math.nan), window // 2, constant_values=math.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    counts = np.isfinite(windows).sum(axis=1)
    sums = np.nansum(windows, axis=1)
    return np.divide(sums, counts, out=np.full(len(values), math.nan), where=counts > 0)


def step_edges(steps: np.ndarray) -> np.ndarray:
    """(lines + 1): where the column of each step begins and ends, halfway to its neighbours."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])
