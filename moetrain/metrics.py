"""From reduced numbers to the lines of metrics.jsonl: pure functions, exact counts.

A training line holds TrainLine, an evaluation line holds EvalLine. Definitions: the drop ledger
counts (token, choice) assignments of valid tokens over the whole optimizer step and all ranks.

Shape suffixes: E experts, K choices, O outcomes of an assignment.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from typing import TypedDict

import torch

from moetrain.moe.ledger import DROPPED, KEPT, NOT_SAMPLED, SPILLED, Ledger, is_conserved
from moetrain.objective import LayerMeans, Means


class LayerLine(TypedDict):
    """One MoE layer over one optimizer step. Counts are exact integers."""

    assigned: int
    """(token, choice) pairs = kept + spilled + dropped + not_sampled."""
    kept: int
    spilled: int
    """Lost by the expert chosen, and taken by another."""
    dropped: int
    """Lost because the expert was full."""
    not_sampled: int
    """Second choices that GShard's random draw left out; they ask for no slot."""
    lost_tokens: int
    """Tokens with no expert left."""
    slots: int
    """Expert slots provided, filled or not."""
    drop_rate: float
    """dropped / assigned."""
    drop_rate_by_choice: list[float]
    """[K] the same of each choice, the best first."""
    token_drop_rate: float
    """lost_tokens / tokens."""
    dropped_gate_mass: float
    """Share of the gate weight that was dropped for lack of capacity."""
    padding_waste: float
    """Share of the slots that stayed empty."""
    effective_capacity_factor: float
    """slots / assigned: the configured factor after rounding and min_capacity."""
    max_vio: float
    """(max load − mean load) / mean load, before drops (2408.15664, eq. 4)."""
    load_cv: float
    """Standard deviation of the load over its mean."""
    load_entropy: float
    """exp(entropy of the load's distribution) / E: 1 when even, 1/E when one expert has all."""
    dead_experts: int
    """Experts that nobody chose."""
    load: list[int]
    """[E] assignments by the expert chosen, before drops; sums to assigned."""
    kept_load: list[int]
    """[E] assignments kept by the expert they chose; sums to kept."""
    row_load: list[int]
    """[E] assignments each expert computed, with those spilled to it; sums to kept + spilled."""
    outcomes_by_rank: list[list[int]]
    """[ranks] kept, spilled, dropped and not_sampled assignments of each rank's own tokens."""


class Speed(TypedDict):
    """How fast an optimizer step was."""

    tokens_per_s: float
    """Over all devices."""
    tflops_per_device: float
    """Model TFLOP/s: what the mathematics needs, recomputation not counted."""
    mfu: float | None
    """Model FLOPs utilisation, a share of 1; None where the device's peak is unknown."""
    step_time_s: float


class TrainLine(Speed):
    """One optimizer step."""

    step: int
    """The step just finished, counted from 1."""
    tokens: int
    """Tokens trained on so far."""
    loss: float
    """Global mean cross-entropy in nats per token, without auxiliary terms."""
    balance_loss: float
    """Mean over MoE layers; 1 at perfect balance; 0 in a dense model."""
    z_loss: float
    """Mean over MoE layers of the mean squared logsumexp of the router logits."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    drop_rate: float
    """Σ dropped / Σ assigned over the MoE layers; 0 in a dense model."""
    token_drop_rate: float
    """Σ lost tokens / Σ tokens over the MoE layers; 0 in a dense model."""
    dropped_gate_mass: float
    """Mean over the MoE layers, as the four that follow; 0 in a dense model."""
    padding_waste: float
    effective_capacity_factor: float
    max_vio: float
    load_cv: float
    load_entropy: float
    dead_experts: int
    """Σ over the MoE layers."""
    bad_steps: int
    """Steps skipped so far because loss or gradient was not finite."""
    memory_gib: float
    layers: list[LayerLine]
    """One entry per MoE layer, first to last."""


class EvalLine(TypedDict):
    """One evaluation on held-out text."""

    step: int
    eval_loss: float
    """Mean cross-entropy in nats per token."""
    eval_nats_per_byte: float
    eval_drop_rate: float


def train_line(
    *,
    step: int,
    tokens: int,
    bad_steps: int,
    means: Means,
    grad_norm: float,
    lr: float,
    speed: Speed,
    memory_gib: float,
) -> TrainLine:
    """The line of one optimizer step.

    Raises AssertionError when a ledger does not conserve its assignments.
    """
    layers = [layer_line(layer) for layer in means.layers]
    return TrainLine(
        step=step,
        tokens=tokens,
        loss=means.loss,
        balance_loss=means.balance_loss,
        z_loss=means.z_loss,
        grad_norm=grad_norm,
        lr=lr,
        drop_rate=drop_rate(means.ledgers),
        token_drop_rate=token_drop_rate(means.ledgers),
        dropped_gate_mass=_mean([layer["dropped_gate_mass"] for layer in layers]),
        padding_waste=_mean([layer["padding_waste"] for layer in layers]),
        effective_capacity_factor=_mean([layer["effective_capacity_factor"] for layer in layers]),
        max_vio=_mean([layer["max_vio"] for layer in layers]),
        load_cv=_mean([layer["load_cv"] for layer in layers]),
        load_entropy=_mean([layer["load_entropy"] for layer in layers]),
        dead_experts=sum(layer["dead_experts"] for layer in layers),
        bad_steps=bad_steps,
        **speed,
        memory_gib=memory_gib,
        layers=layers,
    )


def eval_line(*, step: int, means: Means, nats_per_byte: float) -> EvalLine:
    """The line of one evaluation over the whole held-out set."""
    return EvalLine(
        step=step,
        eval_loss=means.loss,
        eval_nats_per_byte=nats_per_byte,
        eval_drop_rate=drop_rate(means.ledgers),
    )


def layer_line(layer: LayerMeans) -> LayerLine:
    """The exact counts of one MoE layer, and what follows from them.

    Raises AssertionError when the ledger does not conserve its assignments.
    """
    _assert_conserved(layer)
    ledger = layer.ledger
    outcome_EKO = ledger.outcome_EKO
    outcome, slots = outcome_EKO.sum((0, 1)).tolist(), int(ledger.slots)
    assigned, load = int(ledger.assigned), outcome_EKO.sum((1, 2)).tolist()
    by_choice = outcome_EKO.sum(0)
    return LayerLine(
        assigned=assigned,
        kept=outcome[KEPT],
        spilled=outcome[SPILLED],
        dropped=outcome[DROPPED],
        not_sampled=outcome[NOT_SAMPLED],
        lost_tokens=int(ledger.lost_tokens),
        slots=slots,
        drop_rate=_ratio(outcome[DROPPED], assigned),
        drop_rate_by_choice=[_ratio(int(of[DROPPED]), int(of.sum())) for of in by_choice],
        token_drop_rate=_ratio(int(ledger.lost_tokens), int(ledger.tokens)),
        dropped_gate_mass=layer.dropped_gate_mass,
        padding_waste=_ratio(slots - outcome[KEPT] - outcome[SPILLED], slots),
        effective_capacity_factor=_ratio(slots, assigned),
        max_vio=_ratio(max(load) * len(load) - sum(load), sum(load)),
        load_cv=_variation(load),
        load_entropy=_evenness(load),
        dead_experts=load.count(0),
        load=load,
        kept_load=outcome_EKO[:, :, KEPT].sum(1).tolist(),
        row_load=ledger.row_E.tolist(),
        outcomes_by_rank=[list(rank) for rank in layer.outcomes_by_rank],
    )


def drop_rate(ledgers: Sequence[Ledger]) -> float:
    """Σ dropped / Σ assigned over layers; 0 without layers or assignments."""
    dropped = sum(int(ledger.outcome_EKO[:, :, DROPPED].sum()) for ledger in ledgers)
    return _ratio(dropped, sum(int(ledger.outcome_EKO.sum()) for ledger in ledgers))


def token_drop_rate(ledgers: Sequence[Ledger]) -> float:
    """Σ tokens with no expert left / Σ tokens over layers; 0 without layers or tokens."""
    lost = sum(int(ledger.lost_tokens) for ledger in ledgers)
    return _ratio(lost, sum(int(ledger.tokens) for ledger in ledgers))


def speed(
    *,
    step_tokens: int,
    step_time_s: float,
    flops_per_token: float,
    devices: int,
    peak_flops: float | None,
) -> Speed:
    """Throughput of a step over `devices` devices.

    `flops_per_token` counts forward and backward of the active parameters; `peak_flops` is one
    device's, in FLOP/s.
    """
    tokens_per_s = step_tokens / step_time_s
    flops_per_device = flops_per_token * tokens_per_s / devices
    return Speed(
        tokens_per_s=tokens_per_s,
        tflops_per_device=flops_per_device / 1e12,
        mfu=None if peak_flops is None else flops_per_device / peak_flops,
        step_time_s=step_time_s,
    )


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _variation(load: list[int]) -> float:
    mean = sum(load) / len(load)
    return _ratio(math.sqrt(sum((count - mean) ** 2 for count in load) / len(load)), mean)


def _evenness(load: list[int]) -> float:
    """exp(H)/E, H in nats; 0 without any load."""
    shares = [count / sum(load) for count in load if count]
    if not shares:
        return 0.0
    return math.exp(-sum(share * math.log(share) for share in shares)) / len(load)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _assert_conserved(layer: LayerMeans) -> None:
    ledger = layer.ledger
    assert (ledger.outcome_EKO >= 0).all(), f"negative counts: {ledger}"
    assert is_conserved(ledger), f"assignments, outcomes, rows and slots disagree: {ledger}"
    by_rank = [sum(column) for column in zip(*layer.outcomes_by_rank, strict=True)]
    assert by_rank == ledger.outcome_EKO.sum((0, 1)).tolist(), f"ranks do not add up: {layer}"
    # whoever is not lost has a row at least, and one for every choice at most
    served, k = int(ledger.tokens - ledger.lost_tokens), ledger.outcome_EKO.shape[1]
    assert served <= int(ledger.row_E.sum()) <= served * k, f"tokens do not add up: {ledger}"
    assert 0 <= int(ledger.lost_tokens) <= int(ledger.tokens), f"tokens do not add up: {ledger}"
    assert int(ledger.assigned) <= int(ledger.tokens) * k, f"tokens do not add up: {ledger}"
