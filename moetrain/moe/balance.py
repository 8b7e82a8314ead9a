"""Losses on the router, as sums over groups or tokens: the caller divides by global counts.

Sums make the losses independent of how a global batch is cut into ranks and micro-batches. Every
balance loss is 1 per group at perfect balance. Counts are taken before any drop.

Shape suffixes: T tokens, S tokens of one routing group, G groups, K choices, E experts.
"""

from __future__ import annotations

from torch import Tensor

from moetrain.moe.routing import Routing


def _balance_sum(routing: Routing, expert_TK: Tensor, group_size: int) -> Tensor:
    """Σ over groups of E·Σ_e f_e·P_e, f from `expert_TK`; a group without valid tokens adds 0."""
    num_experts, k = routing.prob_TE.shape[1], expert_TK.shape[1]
    valid_GS = routing.valid_T.view(-1, group_size)
    num_valid_G1 = valid_GS.sum(1, keepdim=True).clamp(min=1)
    prob_GSE = routing.prob_TE.view(-1, group_size, num_experts)
    mean_prob_GE = prob_GSE.where(valid_GS[:, :, None], 0).sum(1) / num_valid_G1
    count_GE = expert_TK.new_zeros(valid_GS.shape[0], num_experts)
    asks_GN = valid_GS[:, :, None].expand(-1, -1, k).reshape(-1, group_size * k).long()
    count_GE.scatter_add_(1, expert_TK.reshape(-1, group_size * k), asks_GN)
    fraction_GE = count_GE.to(mean_prob_GE.dtype) / (num_valid_G1 * k)
    return num_experts * (fraction_GE * mean_prob_GE).sum()


def gshard_balance(routing: Routing, group_size: int) -> Tensor:
    """Σ over groups of E·Σ_e (c_e/S)·m_e, c_e the first choices for e, m_e its mean probability.

    GShard's l_aux (2006.16668 Algorithm 1) times E², so that 1 is perfect balance. Returns a 0-d
    tensor, differentiable through m.
    """
    return _balance_sum(routing, routing.expert_TK[:, :1], group_size)


def switch_balance(routing: Routing, group_size: int) -> Tensor:
    """Σ over groups of E·Σ_e f_e·P_e, f_e the share of all K·S choices that fell on e.

    2101.03961 eq. 4, extended to K choices. Returns a 0-d tensor, differentiable through P.
    """
    return _balance_sum(routing, routing.expert_TK, group_size)


def z_loss(routing: Routing) -> Tensor:
    """Σ over valid tokens of logsumexp(logits)² (ST-MoE, 2202.08906 eq. 5): 0-d."""
    z_T = routing.logits_TE.logsumexp(dim=-1).square()
    return z_T.where(routing.valid_T, 0).sum()
