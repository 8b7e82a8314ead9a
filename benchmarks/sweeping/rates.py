"""What counts of layers and steps come to: pure functions over lines of the drop ledger."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from moetrain.config import Config
from moetrain.metrics import LayerLine
from moetrain.model import Transformer
from moetrain.traffic import traffic

Steps = Sequence[Sequence[LayerLine]]
"""Of every step, every MoE layer."""


class Rates(NamedTuple):
    """Shares over some steps and all layers; see `moetrain.metrics.LayerLine`."""

    drop_rate: float
    token_drop_rate: float
    dropped_gate_mass: float
    drop_rate_by_choice: list[float]
    spill_rate: float
    """Σ spilled / Σ assigned."""
    not_sampled_rate: float
    """Σ not_sampled / Σ assigned."""
    padding_waste: float
    effective_capacity_factor: float
    max_vio: float


def rates(steps: Steps) -> Rates:
    """Counts are added up and then divided; what is no ratio of counts is a mean."""
    layers = [layer for step in steps for layer in step]
    assigned, slots = _sum(layers, "assigned"), _sum(layers, "slots")
    filled = _sum(layers, "kept") + _sum(layers, "spilled")
    choices = zip(*(layer["drop_rate_by_choice"] for layer in layers), strict=True)
    return Rates(
        drop_rate=_sum(layers, "dropped") / max(1, assigned),
        token_drop_rate=_mean(layers, "token_drop_rate"),
        dropped_gate_mass=_mean(layers, "dropped_gate_mass"),
        drop_rate_by_choice=[statistics.fmean(choice) for choice in choices],
        spill_rate=_sum(layers, "spilled") / max(1, assigned),
        not_sampled_rate=_sum(layers, "not_sampled") / max(1, assigned),
        padding_waste=(slots - filled) / max(1, slots),
        effective_capacity_factor=slots / max(1, assigned),
        max_vio=_mean(layers, "max_vio"),
    )


def drop_rate_of_step(step: Sequence[LayerLine]) -> float:
    """Σ dropped / Σ assigned over the layers of one step."""
    return rates([step]).drop_rate


def drop_rate_by_layer(steps: Steps) -> list[float]:
    """Σ dropped / Σ assigned over the steps, layer by layer."""
    return [rates([column]).drop_rate for column in zip(*steps, strict=True)]


def late(steps: Sequence[Any]) -> Sequence[Any]:
    """The second half: what a router does that is no longer quite young."""
    return steps[len(steps) // 2 :]


class Flops(NamedTuple):
    """Of the experts' products, forward and backward, in one optimizer step over all ranks."""

    useful: float
    """Of rows that hold an assignment."""
    executed: float
    """Of rows that are multiplied."""


def flops(steps: Steps, executed_rows: Sequence[int], config: Config) -> Flops:
    """The mean of some steps: 18·D·F a row, three products of 2·D·F forward, twice that back.

    `executed_rows` are those that are multiplied in each step, empty ones too.
    """
    of_row = 18 * config.model.dim * config.expert_ffn_dim
    useful_rows = [_sum(step, "kept") + _sum(step, "spilled") for step in steps]
    useful, executed = (of_row * statistics.fmean(rows) for rows in (useful_rows, executed_rows))
    return Flops(useful, executed)


def slots(steps: Steps) -> list[int]:
    """Slots of all layers, filled or not, of every step: what shapes that are static multiply."""
    return [_sum(step, "slots") for step in steps]


def all_to_all_bytes(config: Config, model: Transformer, world: int) -> int:
    """What one rank sends by all-to-all in an optimizer step, to itself too."""
    return sum(row.num_bytes for row in traffic(config, model, world) if row.kind == "all_to_all")


def _sum(layers: Sequence[LayerLine], field: str) -> int:
    return sum(layer[field] for layer in layers)


def _mean(layers: Sequence[LayerLine], field: str) -> float:
    return statistics.fmean(layer[field] for layer in layers)
