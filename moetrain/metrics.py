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
from moetrain.stragglers import RankTimes

ByRank = list[float]
"""A number of every rank, the first's first."""


class LayerLine(TypedDict):
    """One MoE layer over one optimizer step and all ranks. Counts are exact integers; shares and
    rates are 0 where there is nothing to divide by."""

    assigned: int
    """Assignments: (token, choice) pairs. = kept + spilled + dropped + not_sampled."""
    kept: int
    """Assignments computed by the expert they chose."""
    spilled: int
    """Assignments whose expert was full and that another took (drop policy spill)."""
    dropped: int
    """Assignments lost because the expert, and any they could spill to, was full."""
    not_sampled: int
    """Second choices that GShard's random draw left out; they ask for no slot."""
    lost_tokens: int
    """Tokens that no routed expert computed: the layer adds nothing of one to them."""
    slots: int
    """Expert slots provided, filled or not, in groups that hold a token; dropless, those filled."""
    drop_rate: float
    """dropped / assigned."""
    drop_rate_by_choice: list[float]
    """The same of each of the K choices (with expert_choice: of E), the best first."""
    token_drop_rate: float
    """lost_tokens / tokens."""
    dropped_gate_mass: float
    """Gate weight of the dropped assignments / that of all assignments that were sampled."""
    padding_waste: float
    """Empty slots / slots."""
    capacity_factor: float | None
    """The capacity factor of the step; null when dropless."""
    effective_capacity_factor: float
    """slots / assigned: the configured factor after rounding up and min_capacity. (Dropless has
    just the slots it fills, and expert_choice asks for just the slots there are.)"""
    max_vio: float
    """(largest load - mean load) / mean load (2408.15664 eq. 4): 0 when even."""
    load_cv: float
    """Standard deviation of the load over its mean: 0 when even."""
    load_entropy: float
    """exp(entropy of the load's shares) / E: 1 when even, 1/E when one expert has all."""
    dead_experts: int
    """Experts that nobody chose."""
    load: list[int]
    """Assignments by the expert chosen, before drops; they add up to assigned."""
    kept_load: list[int]
    """Assignments kept, by expert; they add up to kept."""
    row_load: list[int]
    """Assignments each expert computed, spilled ones too; they add up to kept + spilled."""
    outcomes_by_rank: list[list[int]]
    """For each rank, what became of its own tokens' assignments: kept, spilled, dropped, not
    sampled."""


class Speed(TypedDict):
    """How fast an optimizer step was."""

    tokens_per_s: float
    """Tokens per second over all devices."""
    tflops_per_device: float
    """Model TFLOP/s: 6 × active parameters that are multiplied, frozen ones too, plus attention;
    neither empty slots nor recomputation count."""
    mfu: float | None
    """Model FLOPs utilisation: that over the device's dense peak, a share of 1; null where the peak
    is not known, on CPUs too."""
    step_time_s: float
    """Mean seconds per step since the line before, without evaluation and checkpoints."""
    step_time_s_by_rank: ByRank
    """The same by rank. Ranks wait for each other, so these are about equal."""
    data_s_by_rank: ByRank
    """Mean seconds per step since the line before in which a rank read its batches."""
    probe_s_by_rank: ByRank
    """Seconds that a fixed matrix product took a rank just now, the mean of three: about equal
    where devices are alike and undisturbed. Empty on a single rank."""


class Rates(TypedDict):
    """All MoE layers of one optimizer step together."""

    drop_rate: float
    """Σ dropped / Σ assigned over the MoE layers."""
    token_drop_rate: float
    """Σ lost tokens / Σ tokens over the MoE layers."""
    dropped_gate_mass: float
    """Mean over the MoE layers."""
    padding_waste: float
    """Mean over the MoE layers."""
    effective_capacity_factor: float
    """Mean over the MoE layers."""
    max_vio: float
    """Mean over the MoE layers."""
    load_cv: float
    """Mean over the MoE layers."""
    load_entropy: float
    """Mean over the MoE layers."""
    dead_experts: int
    """Σ over the MoE layers."""


class TrainLine(Rates, Speed):
    """One optimizer step, over all ranks."""

    step: int
    """The step just finished, counted from 1."""
    tokens: int
    """Tokens trained on so far, padding not among them."""
    loss: float
    """Mean cross-entropy over the global batch in nats per token, without auxiliary losses."""
    balance_loss: float
    """Mean over the MoE layers of the balance loss, without its coefficient: 1 when balanced."""
    z_loss: float
    """Mean over the MoE layers of the router z-loss, without its coefficient."""
    grad_norm: float
    """Global norm of the gradient before clipping; null where loss or gradient was not finite."""
    lr: float
    """Learning rate of the step."""
    bad_steps: int
    """Steps skipped so far because loss or gradient was not finite."""
    spikes: int
    """Steps so far whose loss or gradient norm was finite, but more than train.spike_sigmas above
    that of the steps before; where train.spike_response is skip, they were skipped."""
    is_spike: bool
    """Whether the step was one."""
    memory_gib: float
    """Peak memory so far on rank 0: allocated by torch on its GPU, else resident in the process."""
    layers: list[LayerLine]
    """One object per MoE layer, first to last; empty in a dense model, where the rates are 0."""


class EvalLine(TypedDict):
    """One evaluation on held-out text, under the evaluation capacity factor."""

    step: int
    """The step after which it was made."""
    eval_loss: float
    """Mean cross-entropy in nats per token."""
    eval_nats_per_byte: float | None
    """The same per byte of text, comparable across tokenizers; null where some tokens are no
    targets (data.format chat, data.packing whole)."""
    eval_drop_rate: float
    """Σ dropped / Σ assigned over the MoE layers; 0 in a dense model."""


def train_line(
    *,
    step: int,
    tokens: int,
    bad_steps: int,
    spikes: int,
    is_spike: bool,
    means: Means,
    capacity_factors: Sequence[float | None],
    grad_norm: float,
    lr: float,
    speed: Speed,
    memory_gib: float,
) -> TrainLine:
    """The line of one optimizer step; `capacity_factors` are those of the layers.

    Raises AssertionError when a ledger does not conserve its assignments.
    """
    layers = [
        layer_line(layer, factor)
        for layer, factor in zip(means.layers, capacity_factors, strict=True)
    ]
    return TrainLine(
        step=step,
        tokens=tokens,
        loss=means.loss,
        balance_loss=means.balance_loss,
        z_loss=means.z_loss,
        grad_norm=grad_norm,
        lr=lr,
        **rates(layers, means.ledgers),
        bad_steps=bad_steps,
        spikes=spikes,
        is_spike=is_spike,
        **speed,
        memory_gib=memory_gib,
        layers=layers,
    )


def rates(layers: Sequence[LayerLine], ledgers: Sequence[Ledger]) -> Rates:
    """What all layers of a step come to, given as lines and as ledgers; 0 without layers."""

    def mean(field: str) -> float:
        return _mean([layer[field] for layer in layers])

    return Rates(
        drop_rate=drop_rate(ledgers),
        token_drop_rate=token_drop_rate(ledgers),
        dropped_gate_mass=mean("dropped_gate_mass"),
        padding_waste=mean("padding_waste"),
        effective_capacity_factor=mean("effective_capacity_factor"),
        max_vio=mean("max_vio"),
        load_cv=mean("load_cv"),
        load_entropy=mean("load_entropy"),
        dead_experts=sum(layer["dead_experts"] for layer in layers),
    )


def eval_line(*, step: int, means: Means, nats_per_byte: float | None) -> EvalLine:
    """The line of one evaluation over the whole held-out set."""
    return EvalLine(
        step=step,
        eval_loss=means.loss,
        eval_nats_per_byte=nats_per_byte,
        eval_drop_rate=drop_rate(means.ledgers),
    )


def layer_line(layer: LayerMeans, capacity_factor: float | None) -> LayerLine:
    """The exact counts of one MoE layer under a capacity factor, and what follows from them.

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
        capacity_factor=capacity_factor,
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
    step_tokens: float,
    step_time_s: float,
    rank_times: RankTimes,
    flops_per_token: float,
    devices: int,
    peak_flops: float | None,
) -> Speed:
    """Throughput of a step of so many tokens, padding not among them, over `devices` devices.

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
        step_time_s_by_rank=rank_times.step_s,
        data_s_by_rank=rank_times.data_s,
        probe_s_by_rank=rank_times.probe_s,
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
