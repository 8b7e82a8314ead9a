"""Small fp64 layers, and one forward and backward pass of them with everything that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import oracle
import torch
from oracle_gates import Router
from strategies import DIM, GATES, POLICIES, Case, Given, asking, gate_of, gradients, listen
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.moe import Draws, LayerStats, MoE, keyed

HIDDEN = 5
LAYER = 7
SWITCH = Router("switch", 1)
GSHARD = Router("gshard", 2)
TOP2 = Router("topk", 2)
ROUTERS = {kind: Router(kind, 2) for kind in GATES} | {
    "switch": SWITCH,
    "sigmoid": Router("sigmoid", 2, scale=2.5, groups=2, top_groups=1),
    "dense": Router("dense", 4),
    "hierarchical": Router("hierarchical", 2, groups=2, top_groups=2),
}
"""One of each kind, for layers of four experts."""
WAYS = [
    (kind, factor, policy)
    for kind in GATES
    for factor, policy in [*((0.75, policy) for policy in POLICIES), (None, "position")]
    if factor is not None or kind != "expert_choice"
]
"""Every gate with every drop policy, and dropless where it can be."""
WEIGHTS = (0.7, 0.3)
"""What the balance and z-losses weigh in the scalar whose gradients are compared."""


def build(router: Router, experts: int, **options: Any) -> MoE:
    """An fp64 layer; `capacity_factor` holds in training and evaluation alike."""
    factor = options.pop("capacity_factor", None)
    of_gate = {name: options.pop(name) for name in ("jitter", "random_second") if name in options}
    layer = MoE(
        LAYER,
        DIM,
        HIDDEN,
        experts,
        gate_of(router, **of_gate),
        capacity_factor=factor,
        eval_capacity_factor=factor,
        **options,
    ).double()
    generator = torch.Generator().manual_seed(experts)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
    return layer


def layer_of(case: Case, as_sequences: bool) -> MoE:
    """The case's groups are whole sequences, or pieces of one long sequence."""
    layer = build(
        case.router,
        case.experts,
        capacity_factor=case.factor,
        min_capacity=case.min_capacity,
        group="sequence" if as_sequences else case.group_size,
        drop_policy=case.policy,
        spill_depth=case.depth,
    )
    with torch.no_grad():
        for name, weight in case.weights().items():
            if hasattr(layer.router, name):
                getattr(layer.router, name).copy_(weight)
        if case.router.kind == "sigmoid":
            layer.router.bias.copy_(case.given().bias_E)
    return layer


def draws_for(tokens: int, step: int = 1) -> Draws:
    return Draws(keyed.step_key(0, step), torch.arange(tokens))


def ids_for(tokens: int) -> Tensor:
    """Vocabulary ids, of which some repeat."""
    return torch.arange(tokens) * 5 % 13


def given_for(layer: MoE, sequences: int, length: int, draws: Draws | None) -> Given:
    """What the layer draws and looks up, as its documentation says; `draws` are None outside
    training."""
    tokens, experts = sequences * length, layer.num_experts
    position_T = torch.arange(length).repeat(sequences)
    columns = experts if layer.gate.name == "expert_choice" else layer.gate.top_k
    purpose, keys = "hash", Draws(torch.tensor(0), ids_for(tokens))
    if layer.gate.name == "random":
        purpose, fixed_T = "random", keyed.fold(ids_for(tokens), position_T)
        keys = draws or Draws(torch.tensor(0), fixed_T)
    return Given(
        uniform_T=keyed.uniform(draws, LAYER, "second expert") if draws else None,
        normal_TE=keyed.normal(draws, LAYER, "noise", experts) if draws else None,
        score_TE=keyed.uniform(keys, LAYER, purpose, experts),
        priority_TK=keyed.uniform(draws, LAYER, "drop", columns) if draws else None,
        bias_E=getattr(layer.router, "bias", torch.zeros(experts)),
        position_T=position_T,
    )


def objective(y: Tensor, balance: Tensor, z: Tensor, valid: Sequence[bool]) -> Tensor:
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
    valid: Sequence[bool] | None = None,
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
    shape = x_BLD.shape[:2]
    valid = valid or (True,) * shape.numel()
    token_BL = ids_for(shape.numel()).view(shape)
    arguments = (x_BLD, torch.tensor(valid).view(shape), mode, draws, token_BL)
    y, stats, *_ = (
        checkpoint(layer, *arguments, use_reentrant=False)  # type: ignore[misc]
        if recompute
        else layer(*arguments)
    )
    objective(y, stats.balance_sum, stats.z_sum, valid).backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return Outcome(y.detach(), stats, {**grads, "x": x_BLD.grad})


class Judged:
    """The oracle's run of the same layer, on leaves of its own."""

    def __init__(
        self,
        layer: MoE,
        router: Router,
        x_BLD: Tensor,
        valid: Sequence[bool],
        rules: oracle.Rules,
        given: Given,
        scale_TD: Tensor | float = 1.0,
    ):
        """`scale_TD` multiplies what the router sees and nothing else."""
        leaves = {name: p.detach().clone() for name, p in layer.named_parameters()}
        leaves["x"] = x_BLD.detach().flatten(0, 1).clone()
        for leaf in leaves.values():
            leaf.requires_grad_()
        experts = experts_of(leaves["experts.w_gate_up"], leaves["experts.w_down"])
        seen_TD, no_logits = leaves["x"] * scale_TD, torch.empty(len(valid), layer.num_experts)
        logits = {
            name.removeprefix("router."): torch.stack([weight @ x for x in seen_TD])
            for name, weight in leaves.items()
            if name.startswith("router.")
        }
        heard = listen(router, {"weight": no_logits, **logits}, valid, given)
        self.answer = oracle.layer(router, leaves["x"], heard, experts, rules)
        self.y = torch.stack(self.answer.y)
        total = objective(self.y, self.answer.balance, self.answer.z, valid)
        self.grads = dict(zip(leaves, gradients(total, list(leaves.values())), strict=True))


def same(one: Outcome, other: Outcome) -> None:
    """Equal in every bit."""
    assert torch.equal(one.y, other.y)
    ours, theirs = one.stats, other.stats
    assert torch.equal(ours.balance_sum, theirs.balance_sum)
    assert torch.equal(ours.z_sum, theirs.z_sum)
    for name in ("demand", "ledger", "gate_mass"):
        for mine, other_part in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert torch.equal(mine, other_part), name
    for name, grad in one.grads.items():
        assert grad is not None, name
        assert torch.equal(grad, other.grads[name]), name  # type: ignore[arg-type]


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
    hidden = w_down.shape[1]
    return [
        oracle.Expert(w1=gate_up[:, :hidden], w3=gate_up[:, hidden:], w2=down)
        for gate_up, down in zip(w_gate_up, w_down, strict=True)
    ]


def experts_in(layer: MoE) -> list[oracle.Expert]:
    return experts_of(layer.experts.w_gate_up.detach(), layer.experts.w_down.detach())
