"""From reduced numbers to the lines of metrics.jsonl: pure functions, exact counts.

A training line holds TrainLine, an evaluation line holds EvalLine. Definitions: the drop ledger
counts (token, choice) assignments of valid tokens over the whole optimizer step and all ranks.

Shape suffixes: E experts, K choices, O outcomes of an assignment.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Sequence
from typing import TypedDict

import torch

from moetrain.moe.capacity import DROPPED, KEPT, NOT_SAMPLED, SPILLED, Ledger


class LayerLine(TypedDict):
    """One MoE layer over one optimizer step. Counts are exact integers."""

    assigned: int
    """(token, choice) pairs: K · tokens = kept + spilled + dropped + not_sampled."""
    kept: int
    spilled: int
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
    max_vio: float
    """(max load − mean load) / mean load, before drops (2408.15664, eq. 4)."""
    effective_capacity_factor: float
    """slots / assigned: the configured factor after rounding and min_capacity."""
    dropped_by_choice: list[int]
    """[K] dropped assignments by choice, the best choice first."""
    load: list[int]
    """[E] assignments by expert before drops; sums to assigned."""
    kept_load: list[int]
    """[E] assignments kept by the expert they chose; sums to kept."""


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
    max_vio: float
    """Mean over the MoE layers of each layer's max_vio; 0 in a dense model."""
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
    loss: float,
    balance_loss: float,
    z_loss: float,
    grad_norm: float,
    lr: float,
    ledgers: Sequence[Ledger],
    speed: Speed,
    memory_gib: float,
) -> TrainLine:
    """The line of one optimizer step; `ledgers` are summed over ranks, one per MoE layer.

    Raises AssertionError when a ledger does not conserve its assignments.
    """
    return TrainLine(
        step=step,
        tokens=tokens,
        loss=loss,
        balance_loss=balance_loss,
        z_loss=z_loss,
        grad_norm=grad_norm,
        lr=lr,
        drop_rate=drop_rate(ledgers),
        token_drop_rate=token_drop_rate(ledgers),
        max_vio=_mean([_max_vio(_load(ledger)) for ledger in ledgers]),
        **speed,
        memory_gib=memory_gib,
        layers=[layer_line(ledger) for ledger in ledgers],
    )


def eval_line(
    *, step: int, loss: float, nats_per_byte: float, ledgers: Sequence[Ledger]
) -> EvalLine:
    """The line of one evaluation; `ledgers` are summed over the whole held-out set."""
    return EvalLine(
        step=step,
        eval_loss=loss,
        eval_nats_per_byte=nats_per_byte,
        eval_drop_rate=drop_rate(ledgers),
    )


def layer_line(ledger: Ledger) -> LayerLine:
    """The exact counts of one MoE layer.

    Raises AssertionError when the ledger does not conserve its assignments.
    """
    outcome_EKO = ledger.outcome_EKO
    assert (outcome_EKO >= 0).all(), f"negative counts in {outcome_EKO.tolist()}"
    outcome = outcome_EKO.sum((0, 1)).tolist()
    assigned, slots, load = sum(outcome), int(ledger.slots), _load(ledger)
    line = LayerLine(
        assigned=assigned,
        kept=outcome[KEPT],
        spilled=outcome[SPILLED],
        dropped=outcome[DROPPED],
        not_sampled=outcome[NOT_SAMPLED],
        lost_tokens=int(ledger.lost_tokens),
        slots=slots,
        drop_rate=_ratio(outcome[DROPPED], assigned),
        max_vio=_max_vio(load),
        effective_capacity_factor=_ratio(slots, assigned),
        dropped_by_choice=outcome_EKO[:, :, DROPPED].sum(0).tolist(),
        load=load,
        kept_load=outcome_EKO[:, :, KEPT].sum(1).tolist(),
    )
    _assert_conserved(line, k=outcome_EKO.shape[1], tokens=int(ledger.tokens))
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


def _load(ledger: Ledger) -> list[int]:
    return ledger.outcome_EKO.sum((1, 2)).tolist()


def _max_vio(load: list[int]) -> float:
    return _ratio(max(load) * len(load) - sum(load), sum(load))


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _assert_conserved(line: LayerLine, k: int, tokens: int) -> None:
    outcomes = [line["kept"], line["spilled"], line["dropped"], line["not_sampled"]]
    assert line["assigned"] == sum(outcomes) == k * tokens, f"{k} · {tokens} tokens != {line}"
    assert sum(line["load"]) == line["assigned"], f"load does not sum to assigned: {line}"
    assert sum(line["kept_load"]) == line["kept"], f"kept_load does not sum to kept: {line}"
    assert line["kept"] + line["spilled"] <= line["slots"], f"more kept than slots: {line}"
    assert 0 <= line["lost_tokens"] <= tokens, f"{line['lost_tokens']} of {tokens} tokens lost"
