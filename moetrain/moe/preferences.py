"""What tokens want, chosen or not: a routing compact enough to be kept, and back again.

What decides over slots survives exactly: the choices, the order of the experts behind them, and
gates as drop policies compare them. Logits and probabilities do not.

Shape suffixes: T tokens on this rank, E experts, K choices, X experts of a token's ranking.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.moe.routing import Routing, comparable
from moetrain.moe.spill import ranking_beyond_choices


class Preferences(NamedTuple):
    """The experts that every token ranks highest."""

    expert_TX: Tensor
    """The K choices, then the experts ranked next. E: no such choice, or none that is open. The
    smallest of uint8, int16 and int32 that holds E."""
    weight_TX: Tensor
    """Gates in the precision in which tokens are compared: bf16, fp32 for fp64. An expert beyond
    the choices weighs less than the first choice as it is less probable."""
    sampled_TK: Tensor
    """bool: as in the routing."""
    valid_T: Tensor
    """bool: as in the routing."""

    @property
    def top_k(self) -> int:
        """K, where every token chooses as many."""
        return self.sampled_TK.shape[1]


def preferences(routing: Routing, num_ranked: int) -> Preferences:
    """Note the first `num_ranked` experts of every token's ranking: all K choices at least, and at
    most E. No gradient."""
    expert_TX, weight_TX = routing.expert_TK, routing.gate_TK
    most = min(num_ranked, routing.num_experts) - expert_TX.shape[1]
    if most > 0:
        beyond_TY = ranking_beyond_choices(routing, most)[:, :-1]
        expert_TX = torch.cat([expert_TX, beyond_TY], 1)
        weight_TX = torch.cat([weight_TX, _weights_beyond(routing, beyond_TY)], 1)
    return Preferences(
        expert_TX.to(_holding(routing.num_experts)),
        comparable(weight_TX).to(_half(weight_TX.dtype)),
        routing.sampled_TK,
        routing.valid_T,
    )


def routing_of(
    preferences: Preferences, num_experts: int, k: int, renormalize: bool = False
) -> Routing:
    """A routing that decides as the one noted did, and as one with other `k` would have.

    Scores are made up: they give the same ranking. Probabilities are the weights. Another k than
    was chosen takes the first k of the ranking, all sampled; with `renormalize` their weights are
    scaled to what the choices add up to.
    """
    wide = torch.float64 if preferences.weight_TX.dtype == torch.float32 else torch.float32
    expert_TX, weight_TX = preferences.expert_TX.long(), preferences.weight_TX.to(wide)
    gate_TK, sampled_TK = weight_TX[:, :k], preferences.sampled_TK
    if k != preferences.top_k:
        sampled_TK = torch.ones_like(gate_TK, dtype=torch.bool)
        if renormalize:
            total_T1 = weight_TX[:, : preferences.top_k].sum(1, keepdim=True)
            gate_TK = gate_TK * total_T1 / gate_TK.sum(1, keepdim=True)
    nothing_TE = weight_TX.new_zeros(len(expert_TX), num_experts + 1)  # the last stands for none
    prob_TE = nothing_TE.scatter(1, expert_TX, weight_TX)[:, :num_experts]
    place_TX = torch.arange(expert_TX.shape[1], 0, -1, dtype=wide).expand_as(weight_TX)
    score_TE = (nothing_TE - torch.inf).scatter(1, expert_TX, place_TX)[:, :num_experts]
    expert_TK, valid_T = expert_TX[:, :k].contiguous(), preferences.valid_T
    return Routing(expert_TK, gate_TK, prob_TE, prob_TE, score_TE, sampled_TK, valid_T)


def _weights_beyond(routing: Routing, expert_TY: Tensor) -> Tensor:
    last = routing.num_experts - 1
    prob_TY, first_T1 = (
        routing.prob_TE.gather(1, experts.clamp(max=last))
        for experts in (expert_TY, routing.expert_TK[:, :1])
    )
    tiny = torch.finfo(first_T1.dtype).tiny
    weight_TY = routing.gate_TK[:, :1] * prob_TY / first_T1.clamp(min=tiny)
    return weight_TY.where(expert_TY <= last, 0)


def _holding(num_experts: int) -> torch.dtype:
    kinds = (torch.uint8, torch.int16, torch.int32)
    return next(kind for kind in kinds if num_experts <= torch.iinfo(kind).max)


def _half(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else torch.bfloat16
