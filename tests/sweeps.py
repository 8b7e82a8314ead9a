"""Rows of a sweep that nobody ran, with numbers that are easily told apart."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from sweeping.plan import Refused  # noqa: E402
from sweeping.rates import Rates  # noqa: E402
from sweeping.table import Row, Sweep  # noqa: E402


def traced(factor: float | None, drops: float, padding: float, **others: Any) -> Row:
    """A variant of which nothing is known but where its tokens went."""
    label = "dropless" if factor is None else str(factor)
    rates = Rates(
        drop_rate=drops,
        token_drop_rate=drops / 4,
        dropped_gate_mass=drops / 2,
        drop_rate_by_choice=[drops / 2, 3 * drops / 2],
        spill_rate=0.0,
        not_sampled_rate=0.125,
        padding_waste=padding,
        effective_capacity_factor=0.875 if factor is None else factor,
        max_vio=0.5,
    )
    row = Row(
        label=label,
        router="gshard",
        top_k=2,
        experts=8,
        drop_policy="position",
        group="sequence",
        capacity_factor=factor,
        rates=rates,
        drop_rate_by_layer=[2 * drops, 0.0],
        drop_rate_over_time=[(step, drops * 12 / step) for step in range(11, 31)],
        useful_flops=(1 - drops) * 1e9,
        executed_flops=(1 - drops) / (1 - padding) * 1e9,
        all_to_all_bytes=2**20,
    )
    return replace(row, **others)


def trained(
    factor: float | None, drops: float, time_s: float, *losses: float, **others: Any
) -> Row:
    """A variant that was trained, with its held-out losses at the end."""
    mean = sum(losses) / len(losses)
    row = traced(
        factor,
        drops,
        padding=0.0 if factor is None else 1 - (1 - drops) / factor / 1.5,
        step_time_s=time_s,
        turn_ratios=[0.9 * time_s, time_s, 1.1 * time_s],
        tokens_per_s=4096 / time_s,
        held_bytes=2**27,
        step_bytes=int(2**28 * time_s),
        losses=list(losses),
        own_loss=mean + drops,
        equal_time_loss=mean + time_s / 50,
        eval_drop_rate=drops / 2,
        loss_over_time=[(10, 3.0), (20, (3 + mean) / 2), (30, mean)],
        training_loss=[(step, 3.0 - step / 30) for step in range(11, 31)],
    )
    return replace(row, **others)


ROWS = [
    trained(0.75, 0.17, 0.96, 2.060, 2.162),
    trained(1.0, 0.06, 0.97, 2.030, 2.129),
    trained(1.25, 0.004, 1.0, 2.001, 2.102),
    trained(2.0, 0.0002, 1.11, 2.000, 2.101),
    trained(None, 0.0, 1.3, 2.002, 2.100),
]
"""What a sweep might find: 1.25 loses nothing that can be told, and is faster than the others."""

SWEEP = Sweep(
    name="quickstart",
    what="10 steps, then 20 of every variant.",
    scale="2 layers of width 16 after 30 steps",
    rows=ROWS,
    own="1.25",
    refused=[Refused("switch, 1.25", "moe.top_k (2) must be 1 for moe.router switch")],
    config={"name": "quickstart"},
)
