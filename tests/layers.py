"""Small fp64 layers, and one forward and backward pass of them with everything that comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import oracle
import torch
from strategies import asking
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.moe import Draws, LayerStats, MoE, keyed

DIM, HIDDEN = 3, 5
LAYER = 7
TOP2 = oracle.Router("topk", 2)
SWITCH = oracle.Router("switch", 1)
GSHARD = oracle.Router("gshard", 2)
WEIGHTS = (0.7, 0.3)
"""What the balance and z-losses weigh in the scalar whose gradients are compared."""


def build(router: oracle.Router, experts: int, **options: Any) -> MoE:
    """An fp64 layer; `capacity_factor` holds in training and evaluation alike."""
    factor = options.pop("capacity_factor", None)
    layer = MoE(
        LAYER,
        DIM,
        HIDDEN,
        experts,
        router.k,
        router.kind,  # type: ignore[arg-type]
        renormalize=router.renormalize,
        capacity_factor=factor,
        eval_capacity_factor=factor,
        **options,
    ).double()
    generator = torch.Generator().manual_seed(experts)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
    return layer


def draws_for(tokens: int, step: int = 1) -> Draws:
    return Draws(keyed.step_key(0, step), torch.arange(tokens))


def objective(y: Tensor, balance: Tensor, z: Tensor, valid: tuple[bool, ...]) -> Tensor:
    """A scalar in which every output of a valid token has a weight of its own."""
    weight_TD = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(-1, y.shape[-1])
    mask_T1 = torch.tensor(valid)[:, None]
    seen = torch.where(mask_T1, y.reshape(weight_TD.shape) * weight_TD, 0)
    return seen.sum() + WEIGHTS[0] * balance + WEIGHTS[1] * z


@dataclass
class Outcome:
    """One forward and backward pass."""

    y: Tensor
    stats: LayerStats
    grads: dict[str, Tensor | None]


def run(
    layer: MoE,
    x_BLD: Tensor,
    valid: tuple[bool, ...] | None = None,
    mode: str = "eval",
    draws: Draws | None = None,
    *,
    recompute: bool = False,
) -> Outcome:
    """Forward and backward of `objective`; gradients by parameter name, and of the input as x.

    `recompute` runs the forward a second time in the backward, as activation checkpointing does.
    """
    layer.zero_grad()
    x_BLD = x_BLD.detach().requires_grad_()
    valid = valid or (True,) * x_BLD.shape[:2].numel()
    valid_BL = torch.tensor(valid).view(x_BLD.shape[:2])
    arguments = (x_BLD, valid_BL, mode, draws)
    y, stats = (
        checkpoint(layer, *arguments, use_reentrant=False)  # type: ignore[misc]
        if recompute
        else layer(*arguments)
    )
    objective(y, stats.balance_sum, stats.z_sum, valid).backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return Outcome(y.detach(), stats, {**grads, "x": x_BLD.grad})


def same(one: Outcome, other: Outcome) -> None:
    """Equal in every bit."""
    assert torch.equal(one.y, other.y)
    for ours, theirs in zip(one.stats[:2], other.stats[:2], strict=True):
        assert torch.equal(ours, theirs)
    assert_same_ledger(one, other)
    for name, grad in one.grads.items():
        assert grad is not None, name
        assert torch.equal(grad, other.grads[name]), name  # type: ignore[arg-type]


def assert_same_ledger(one: Outcome, other: Outcome) -> None:
    for ours, theirs in zip(one.stats.ledger, other.stats.ledger, strict=True):
        assert torch.equal(ours, theirs)


def random_x(sequences: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, length, DIM, generator=generator, dtype=torch.float64)


def asks(layer: MoE, choices: list[tuple[int, ...]]) -> Tensor:
    """Set the router so that unit vectors ask for the experts listed; returns those vectors."""
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, : len(choices)] = asking(choices, layer.num_experts).T
    return torch.eye(len(choices), DIM, dtype=torch.float64)[None]


def experts_of(w_gate_up: Tensor, w_down: Tensor) -> list[oracle.Expert]:
    """The packed weights of a layer, unpacked; gate and up lie side by side."""
    return [
        oracle.Expert(w1=gate_up[:, :HIDDEN], w3=gate_up[:, HIDDEN:], w2=down)
        for gate_up, down in zip(w_gate_up, w_down, strict=True)
    ]


def experts_in(layer: MoE) -> list[oracle.Expert]:
    return experts_of(layer.experts.w_gate_up.detach(), layer.experts.w_down.detach())
