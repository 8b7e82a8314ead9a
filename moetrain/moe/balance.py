"""Losses on the router: every balance loss is 1 at perfect balance, whatever K.

A loss is a function of what a set of tokens adds up to (`Demand`): how often each expert was
chosen, counted before any drop, and masses such as its summed probability, through which gradients
flow. So the same formula serves a routing group (`balance`) and, joined, the whole global batch
(`mass_gradient`), and depends on neither ranks nor micro-batches.

Shape suffixes: T tokens, S tokens of one routing group, G sets of tokens, N assignments of one,
M masses, K choices, E experts, A groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.moe.router import Gate
from moetrain.moe.routing import Routing, occurrences


class Demand(NamedTuple):
    """What sets of tokens ask of the experts: sums, so that sets can be joined."""

    count_GE: Tensor
    """int64: choices that count for the gate, before any drop."""
    mass_GME: Tensor
    """fp32 (fp64): what the gate's loss is differentiated through."""
    tokens_G: Tensor
    """int64: valid tokens."""


def demand(gate: Gate, routing: Routing, group_size: int) -> Demand:
    """Sum up each routing group of `group_size` tokens."""
    expert_TK = routing.expert_TK[:, :1] if gate.name == "gshard" else routing.expert_TK
    valid_GS = routing.valid_T.view(-1, group_size)
    num_groups, k = len(valid_GS), expert_TK.shape[1]
    asked_GN = torch.where(
        valid_GS.repeat_interleave(k, 1), expert_TK.view(num_groups, -1), routing.num_experts
    )
    mass_TME = _MASSES.get(gate.name, _probability)(gate, routing)
    mass_TME = mass_TME.where(routing.valid_T[:, None, None], 0)
    mass_GME = mass_TME.unflatten(0, (num_groups, group_size)).sum(1)
    return Demand(occurrences(asked_GN, routing.num_experts), mass_GME, valid_GS.sum(1))


def balance(gate: Gate, demand: Demand) -> Tensor:
    """The gate's balance loss of every set, (G,); 0 for a set without valid tokens."""
    loss_G = _LOSSES.get(gate.name, _switch_loss)(gate, demand)
    return loss_G.where(demand.tokens_G > 0, 0)


def join(parts: Demand) -> Demand:
    """All sets as one: G = 1."""
    return Demand(*(part.sum(0, keepdim=True) for part in parts))


def mass_gradient(gate: Gate, total: Demand) -> tuple[Tensor, Tensor]:
    """The balance loss of joined sets, (1,), and its gradient by their mass, (1, M, E).

    Mass is a sum, so Σ gradient·(mass of a part), over all parts, has the gradient of the loss.
    """
    mass_GME = total.mass_GME.detach().requires_grad_()
    with torch.enable_grad():
        loss_G = balance(gate, total._replace(mass_GME=mass_GME))
        (gradient_GME,) = torch.autograd.grad(loss_G.sum(), mass_GME)
    return loss_G.detach(), gradient_GME


def z_loss(routing: Routing) -> Tensor:
    """Σ over valid tokens of logsumexp(logits)² (ST-MoE, 2202.08906 eq. 5): 0-d."""
    z_T = routing.logits_TE.logsumexp(dim=-1).square()
    return z_T.where(routing.valid_T, 0).sum()


# ---------------------------------------------------------------- masses


def _probability(_gate: Gate, routing: Routing) -> Tensor:
    return routing.prob_TE[:, None]


def _gates_and_load(_gate: Gate, routing: Routing) -> Tensor:
    assert routing.load_TE is not None
    empty_TE = torch.zeros_like(routing.prob_TE)
    return torch.stack(
        [empty_TE.scatter(1, routing.expert_TK, routing.gate_TK), routing.load_TE], 1
    )


def _both_levels(gate: Gate, routing: Routing) -> Tensor:
    """The joint probability, and the probability inside the groups that the token chose."""
    prob_TAe = routing.prob_TE.unflatten(1, (gate.groups, -1))
    inner_TAe = prob_TAe / _positive(prob_TAe.sum(dim=-1, keepdim=True))
    size = prob_TAe.shape[2]
    is_open_TA = torch.zeros_like(prob_TAe[:, :, 0], dtype=torch.bool)
    is_open_TA.scatter_(1, routing.expert_TK // size, True)
    return torch.stack([routing.prob_TE, inner_TAe.where(is_open_TA[:, :, None], 0).flatten(1)], 1)


_MASSES: dict[str, Callable[[Gate, Routing], Tensor]] = {
    "noisy_topk": _gates_and_load,
    "hierarchical": _both_levels,
}


# ---------------------------------------------------------------- losses


def _switch_loss(_gate: Gate, demand: Demand) -> Tensor:
    """E·Σ_e f_e·P_e, f the share of choices and P the mean probability.

    2101.03961 eq. 4, extended to K choices. With first choices alone it is E² times the l_aux of
    GShard's Algorithm 1 (2006.16668); of a single sequence, DeepSeek-V3's eq. 17 (2412.19437).
    """
    return _dot(demand.count_GE, demand.mass_GME[:, 0], demand.tokens_G[:, None])


def _dot(count: Tensor, mass: Tensor, tokens: Tensor) -> Tensor:
    """n·Σ share·(mass per token) over the last dimension, n its length."""
    share = count.to(mass.dtype) / count.sum(-1, keepdim=True).clamp(min=1)
    return count.shape[-1] * (share * (mass / tokens.clamp(min=1))).sum(-1)


def _variation_loss(_gate: Gate, demand: Demand) -> Tensor:
    """1 + CV(importance)² + CV(load)² (1701.06538 eq. 7 and 11; the 1 is our scale)."""
    mean_GM = demand.mass_GME.mean(-1)
    variance_GM = demand.mass_GME.var(-1, correction=0)
    return 1 + (variance_GM / _positive(mean_GM.square())).sum(-1)


def _positive(divisor: Tensor) -> Tensor:
    """What is 0 only where nothing is asked, made safe to divide by, forward and backward."""
    return divisor.clamp(min=torch.finfo(divisor.dtype).tiny)


def _hierarchical_loss(gate: Gate, demand: Demand) -> Tensor:
    """The mean of the Switch loss over groups of experts, and of its mean inside the groups chosen.

    1701.06538 App. B balances both levels at once, by its own losses.
    """
    count_GAe = demand.count_GE.unflatten(1, (gate.groups, -1))
    joint_GAe, inner_GAe = demand.mass_GME.unflatten(2, (gate.groups, -1)).unbind(1)
    outer_G = _dot(count_GAe.sum(-1), joint_GAe.sum(-1), demand.tokens_G[:, None])
    per_group = gate.top_k // gate.top_groups
    tokens_GA = count_GAe.sum(-1) // per_group
    inner_GA = _dot(count_GAe, inner_GAe, tokens_GA[:, :, None])
    num_chosen_G = (tokens_GA > 0).sum(-1).clamp(min=1)
    return (outer_G + inner_GA.sum(-1) / num_chosen_G) / 2


_LOSSES: dict[str, Callable[[Gate, Demand], Tensor]] = {
    "noisy_topk": _variation_loss,
    "hierarchical": _hierarchical_loss,
}
