"""The drop policy `spill`: who finds an expert full goes on to the next in the token's ranking.

Shape suffixes: T tokens on this rank, S tokens of one routing group, G groups, K choices,
E experts, X experts ranked beyond a token's choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.capacity import plan_capacity
from moetrain.moe.routing import Routing, choose, occurrences


def spill(routing: Routing, group_size: int, slots: int, depth: int) -> Routing:
    """Settle who goes where when the losers of `position` may go on to other experts.

    Choice by choice, and within a choice in at most `depth` rounds: every token whose choice is
    still lost asks the next expert in its ranking, beyond its own choices, and one round's requests
    take the free slots in token order. An expert that turned a token away is not asked again by it.

    Returns the routing as it will be carried out: with the new expert, weighing
    gate·min(1, p(new)/p(lost)), or E where no expert had room. Nobody loses in a plan of it.
    """
    plan = plan_capacity(routing, group_size, slots)
    num_experts, k = routing.num_experts, routing.expert_TK.shape[1]
    asks_TK = routing.sampled_TK & routing.asks_TK
    lost_TK = asks_TK & (plan.row_TK == plan.source_R.numel())
    expert_TK = routing.expert_TK.masked_fill(lost_TK, num_experts)
    ranking_TX = ranking_beyond_choices(routing, most=k * depth)
    next_T1 = torch.zeros_like(expert_TK[:, :1])
    free_GE = slots - _taken(expert_TK.masked_fill(~asks_TK, num_experts), group_size, num_experts)
    for choice in range(k):
        lost_T = lost_TK[:, choice]
        for _ in range(depth):
            wanted_T = ranking_TX.gather(1, next_T1).squeeze(1).where(lost_T, num_experts)
            next_T1 += (wanted_T < num_experts)[:, None].long()
            found_T = _first_come(wanted_T, free_GE)
            expert_TK[:, choice] = wanted_T.where(found_T, expert_TK[:, choice])
            free_GE -= _taken(
                wanted_T.where(found_T, num_experts)[:, None], group_size, num_experts
            )
            lost_T = lost_T & ~found_T
    return settle(routing, expert_TK)


def settle(routing: Routing, expert_TK: Tensor) -> Routing:
    """The routing with the experts that `spill` found for it, E for none, and their gates."""
    return routing._replace(expert_TK=expert_TK, gate_TK=_settled_gates(routing, expert_TK))


def ranking_beyond_choices(routing: Routing, most: int) -> Tensor:
    """The experts next in every token's ranking, (T, X + 1) with E at the end and where none is
    open; X is at most `most`."""
    num_experts = routing.num_experts
    open_TE = torch.cat([routing.score_TE, routing.score_TE[:, :1]], 1)
    open_TE = open_TE.scatter(1, routing.expert_TK, -torch.inf)[:, :num_experts]
    ranking_TX = choose(open_TE, min(most, num_experts))
    num_open_T1 = (open_TE > -torch.inf).sum(1, keepdim=True)
    is_closed_TX = torch.arange(ranking_TX.shape[1], device=ranking_TX.device) >= num_open_T1
    none_T1 = torch.full_like(ranking_TX[:, :1], num_experts)
    return torch.cat([ranking_TX.masked_fill(is_closed_TX, num_experts), none_T1], dim=1)


def _taken(expert_TK: Tensor, group_size: int, num_experts: int) -> Tensor:
    """How many assignments of each group go to each expert: int64 (G, E)."""
    return occurrences(expert_TK.reshape(-1, group_size * expert_TK.shape[1]), num_experts)


def _first_come(wanted_T: Tensor, free_GE: Tensor) -> Tensor:
    """Whether each token's request (E: none) finds a free slot of its group, in token order."""
    num_groups, num_experts = free_GE.shape
    wanted_GS = wanted_T.view(num_groups, -1)
    sorted_GS, order_GS = wanted_GS.sort(dim=1, stable=True)
    count_GE = occurrences(wanted_GS, num_experts)
    none_G1 = torch.zeros_like(free_GE[:, :1])
    limit_GE = torch.cat([count_GE.cumsum(1) - count_GE + free_GE, none_G1], 1)
    place_S = torch.arange(wanted_GS.shape[1], device=wanted_T.device)
    found_GS = place_S < limit_GE.gather(1, sorted_GS)
    return torch.empty_like(found_GS).scatter_(1, order_GS, found_GS).flatten()


def _settled_gates(routing: Routing, expert_TK: Tensor) -> Tensor:
    """Gates after spilling: as probable as the new expert is, and never above what was lost.

    Most gates are c·p, and so is the new one. Where a bias or a group chose, p of the lost expert
    may be the smaller by far, which must not blow the weight up.
    """
    num_experts, lost_TK = routing.num_experts, expert_TK != routing.expert_TK
    new_TK, old_TK = (
        routing.prob_TE.gather(1, experts.clamp(max=num_experts - 1))
        for experts in (expert_TK, routing.expert_TK)
    )
    shrinks_TK = lost_TK & (expert_TK < num_experts) & (new_TK <= old_TK)
    divisor_TK = old_TK.where(shrinks_TK, 1).clamp(min=torch.finfo(old_TK.dtype).tiny)
    return torch.where(shrinks_TK, routing.gate_TK * new_TK / divisor_TK, routing.gate_TK)
