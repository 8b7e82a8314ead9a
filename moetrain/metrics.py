"""From reduced numbers to the lines of metrics.jsonl: pure functions, exact counts.

A training line holds TrainLine, an evaluation line holds EvalLine. Definitions: the drop ledger
counts (token, choice) assignments of valid tokens over the whole optimizer step and all ranks.

Shape suffixes: E experts, K choices, O outcomes of an assignment.
"""

from __future__ import annotations

import math
import re
import resource
import sys
from collections.abc import Sequence
from typing import TypedDict

import torch

from moetrain.moe.ledger import DROPPED, KEPT, NOT_SAMPLED, SPILLED, Ledger
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
    ledger = layer.ledger
    outcome_EKO = ledger.outcome_EKO
    outcome, slots = outcome_EKO.sum((0, 1)).tolist(), int(ledger.slots)
    assigned, load = int(ledger.assigned), outcome_EKO.sum((1, 2)).tolist()
    by_choice = outcome_EKO.sum(0)
    line = LayerLine(
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
    _assert_conserved(line, tokens=int(ledger.tokens))
    return line


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


# Dense peak in TFLOP/s (structured sparsity not counted) from the vendors' datasheets, by the
# words a device's name must contain; the more specific names come first.
_PEAK_TFLOPS: tuple[tuple[frozenset[str], dict[str, float]], ...] = (
    (frozenset({"GB200"}), {"bf16": 2500, "tf32": 1250, "fp32": 80}),
    (frozenset({"B200"}), {"bf16": 2250, "tf32": 1125, "fp32": 75}),
    (frozenset({"GH200"}), {"bf16": 989.5, "tf32": 494.5, "fp32": 67}),
    (frozenset({"H200", "NVL"}), {"bf16": 835.5, "tf32": 417.5, "fp32": 60}),
    (frozenset({"H200"}), {"bf16": 989.5, "tf32": 494.5, "fp32": 67}),
    (frozenset({"H100", "NVL"}), {"bf16": 835.5, "tf32": 417.5, "fp32": 60}),
    (frozenset({"H100", "PCIE"}), {"bf16": 756.5, "tf32": 378, "fp32": 51}),
    (frozenset({"H100"}), {"bf16": 989.5, "tf32": 494.5, "fp32": 67}),
    (frozenset({"A100"}), {"bf16": 312, "tf32": 156, "fp32": 19.5}),
    (frozenset({"L40S"}), {"bf16": 362.05, "tf32": 183, "fp32": 91.6}),
    (frozenset({"L4"}), {"bf16": 121, "tf32": 60, "fp32": 30.3}),
    (frozenset({"A10"}), {"bf16": 125, "tf32": 62.5, "fp32": 31.2}),
    (frozenset({"RTX", "4090"}), {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    (frozenset({"RTX", "3090"}), {"bf16": 71, "tf32": 35.6, "fp32": 35.6}),
    (frozenset({"MI300X"}), {"bf16": 1307.4, "tf32": 653.7, "fp32": 163.4}),
    (frozenset({"MI325X"}), {"bf16": 1307.4, "tf32": 653.7, "fp32": 163.4}),
)

# A slice of a device, or a slower chip that goes by the same number.
_ANOTHER_DEVICE = frozenset({"MIG", "LAPTOP", "MAX", "D", "TI"})


def peak_flops(device_name: str, arithmetic: str) -> float | None:
    """Dense peak FLOP/s of a GPU in `bf16`, `tf32` or `fp32`; None where it is not known."""
    words = frozenset(re.split(r"[\s_-]+", device_name.upper()))
    if words & _ANOTHER_DEVICE:
        return None
    for required, tflops in _PEAK_TFLOPS:
        if required <= words and arithmetic in tflops:
            return tflops[arithmetic] * 1e12
    return None


def device_peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak FLOP/s of `device` for a run in `precision` (bf16, fp32, fp64), or None.

    fp32 counts as TF32 where torch may use it for matrix products.
    """
    if device.type != "cuda":
        return None
    may_use_tf32 = torch.get_float32_matmul_precision() != "highest"
    arithmetic = "tf32" if precision == "fp32" and may_use_tf32 else precision
    return peak_flops(torch.cuda.get_device_name(device), arithmetic)


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


def _assert_conserved(line: LayerLine, tokens: int) -> None:
    outcomes = [line["kept"], line["spilled"], line["dropped"], line["not_sampled"]]
    assert min(outcomes) >= 0, f"negative counts: {line}"
    assert line["assigned"] == sum(outcomes), f"outcomes do not add up to assigned: {line}"
    assert sum(line["load"]) == line["assigned"], f"load does not add up to assigned: {line}"
    assert sum(line["kept_load"]) == line["kept"], f"kept_load does not add up to kept: {line}"
    arrived = line["kept"] + line["spilled"]
    assert sum(line["row_load"]) == arrived <= line["slots"], f"rows do not add up: {line}"
    by_rank = [sum(column) for column in zip(*line["outcomes_by_rank"], strict=True)]
    assert by_rank == outcomes, f"ranks do not add up: {line}"
    assert 0 <= line["lost_tokens"] <= tokens, f"{line['lost_tokens']} of {tokens} tokens lost"
