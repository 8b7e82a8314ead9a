"""One optimizer step: forward, loss and backward of every micro-batch, update, router biases."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetrain.autopilot import OFF, Autopilot
from moetrain.build import gate, routing_group_tokens
from moetrain.config import Config, TrainConfig
from moetrain.data import Batch, Prepared, Samples
from moetrain.engines import Engine
from moetrain.evaluate import forward, on_device
from moetrain.mesh import Mesh
from moetrain.moe import Draws, Ledger, MoE, Router
from moetrain.moe.keyed import step_key
from moetrain.moe.ledger import is_conserved
from moetrain.objective import (
    BatchBalance,
    Counts,
    Sums,
    batch_balance,
    count,
    count_all,
    loads,
    objective,
    sums,
    tally,
)
from moetrain.optim import StepOutcome, lr_at
from moetrain.spikes import EMPTY, FINITE, Limits, Window


@dataclass(frozen=True)
class Run:
    """What stays the same from step to step."""

    config: Config
    folder: Path
    mesh: Mesh
    prepared: Prepared
    engine: Engine
    samples: Samples
    held_out: Samples


@dataclass(frozen=True)
class Position:
    """How far a run has come: with weights and moments, all that changes.

    There is no generator state: every random draw is a function of seed, step and token.
    """

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Sequences trained on, and so the global index of the next."""
    tokens: int = 0
    """Tokens trained on."""
    bad_steps: int = 0
    """Steps skipped because loss or gradient was not finite."""
    bad_in_a_row: int = 0
    """Steps skipped since the last one that was not, spikes too."""
    owes_evaluation: bool = False
    """Whether an evaluation is due here and has not been done."""
    spikes: int = 0
    """Steps that were a spike, skipped or not."""
    window: Window = EMPTY
    """What spikes are told from."""
    autopilot: Autopilot = OFF
    """The capacity factors of the layers, where `moe.capacity_factor` is auto."""

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Position:
        """From what JSON makes of its fields; an older version did not save all of them."""
        window, autopilot = saved.get("window", {}), saved.get("autopilot", {})
        parts = {"window": Window(**window), "autopilot": Autopilot(**autopilot)}
        return cls(**{**saved, **parts})


class StepResult(NamedTuple):
    """One optimizer step, before anything is brought together."""

    parts: list[Sums]
    """What each micro-batch of this rank added."""
    counts: Counts
    batch_balance: BatchBalance | None
    outcome: StepOutcome
    limits: Limits
    """Beyond which it is a spike."""
    lr: float
    data_s: float
    """Seconds in which this rank read its batches."""
    capacity_factors: list[float | None]
    """That every MoE layer ran with; None where dropless."""
    tally: list[list[int]]
    """What the autopilot goes by; empty without one, and where the step was skipped."""

    @property
    def is_bad(self) -> bool:
        """Whether loss or gradient was not finite, and the step skipped, on every rank alike."""
        return not math.isfinite(self.outcome.grad_norm)

    @property
    def is_spike(self) -> bool:
        """Whether loss or gradient norm was finite, but far above that of the steps before."""
        loss, grad_norm, _ = self.outcome
        return not self.is_bad and not self.limits.admit(loss, grad_norm)


def train_step(run: Run, position: Position, num_ranked: int = 0) -> StepResult:
    """One optimizer step on the next global batch, which notes `num_ranked` preferences of every
    token."""
    config, mesh = run.config, run.mesh
    capacity_factors = _set_factors(run, position.autopilot)
    step, started = position.step + 1, time.perf_counter()
    batches = [
        on_device(run.samples.batch(indices), mesh.device)
        for indices in sample_indices(config, mesh.rank, mesh.world, position.samples)
    ]
    data_s = time.perf_counter() - started
    group_size = routing_group_tokens(config)
    counts = count_all([count(batch, group_size) for batch in batches], mesh)
    key = step_key(config.seed, step, mesh.device)
    parts, balance = [], _survey(run, batches, key)
    for number, batch in enumerate(batches, start=1):
        part = _forward(run, batch, key, num_ranked)
        if balance is None and config.balances_batch:
            balance = batch_balance(gate(config.moe), [part.demands], mesh)
        coefs = config.moe.balance_coef, config.moe.z_loss_coef
        run.engine.backward(objective(part, counts, *coefs, balance), last=number == len(batches))
        parts.append(part.detach())
    lr = _lr(config.train, step)
    limits = position.window.limits(config.train.spike_sigmas)
    applied = FINITE if config.train.spike_response == "warn" else limits
    outcome = run.engine.step(lr, applied)
    _check_ledgers(parts)
    counted = []
    if not outcome.was_skipped:
        _rebalance(run, parts)
        if capacity_factors and config.moe.capacity_factor == "auto":
            counted = tally(parts, mesh).tolist()
    return StepResult(
        parts, counts, balance, outcome, limits, lr, data_s, capacity_factors, counted
    )


def _set_factors(run: Run, autopilot: Autopilot) -> list[float | None]:
    """Let every MoE layer run with the capacity factor that is due; returns those of all layers."""
    layers = [module for module in run.engine.model.modules() if isinstance(module, MoE)]
    if run.config.moe.capacity_factor == "auto":
        for layer, factor in zip(layers, autopilot.of_layers(len(layers)), strict=True):
            layer.factors["train"] = factor
    return [layer.factors["train"] for layer in layers]


def _forward(run: Run, batch: Batch, key: Tensor, num_ranked: int = 0) -> Sums:
    draws = Draws(key, batch.token_id_BL.flatten())
    return sums(forward(run.engine.model, batch, "train", draws, num_ranked))


@torch.no_grad()
def _survey(run: Run, batches: list[Batch], key: Tensor) -> BatchBalance | None:
    """The balance of the whole batch, where it is wanted before the first of several backwards.

    The price of an exact loss over micro-batches: a forward pass more. Routing is a function of
    weights and keys, so the second pass routes as this one.
    """
    if not run.config.balances_batch or len(batches) == 1:
        return None
    demands = [_forward(run, batch, key).demands for batch in batches]
    return batch_balance(gate(run.config.moe), demands, run.mesh)


def _check_ledgers(parts: list[Sums]) -> None:
    """Every assignment of this rank is accounted for: looked at after the step, when the device has
    nothing left to do."""
    ledgers = [ledger for part in parts for ledger in part.ledgers]
    if not ledgers:
        return
    stacked = Ledger(*(torch.stack(entries) for entries in zip(*ledgers, strict=True)))
    if not is_conserved(stacked).all():
        raise AssertionError(f"a drop ledger does not add up: {ledgers}")


def _rebalance(run: Run, parts: list[Sums]) -> None:
    """The step of the routers' biases, on what the whole global batch asked for."""
    rate = run.config.moe.bias_update_rate
    routers = [m for m in run.engine.model.modules() if isinstance(m, Router)]
    is_frozen = "router" in run.config.train.freeze
    if routers and routers[0].gate.name == "sigmoid" and rate > 0 and not is_frozen:
        for router, load_E in zip(routers, loads(parts, run.mesh), strict=True):
            router.rebalance(load_E, rate)


def sample_indices(config: Config, rank: int, world: int, first: int) -> list[range]:
    """The samples of one rank's micro-batches in the global batch that starts at `first`."""
    micro = config.train.micro_batch
    starts = [first + (j * world + rank) * micro for j in range(config.accumulation(world))]
    return [range(start, start + micro) for start in starts]


def _lr(train: TrainConfig, step: int) -> float:
    return lr_at(
        step,
        steps=train.steps,
        peak=train.lr,
        min_ratio=train.min_lr_ratio,
        warmup_steps=train.warmup_steps,
        schedule=train.schedule,
        decay_fraction=train.decay_fraction,
    )
