"""Gates: router logits -> Routing, one pure function per algorithm.

Shape suffixes: T tokens on this rank, E experts, K choices per token.
A gate knows nothing of capacity or transport; its record is all that they need.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Which experts every token chose, and with what weight."""

    expert_TK: Tensor
    """int64: the chosen experts, best first; the lowest index wins a tie."""
    gate_TK: Tensor
    """fp32 (fp64 for fp64 logits): the weight of each expert's output; differentiable."""
    prob_TE: Tensor
    """Softmax of the logits; differentiable."""
    logits_TE: Tensor
    """What the router said."""
    sampled_TK: Tensor
    """bool: False where a choice was not sampled, so that it asks for no slot."""
    valid_T: Tensor
    """bool: False for padding, which takes no slot and enters no statistic."""


def choose(score_TE: Tensor, k: int) -> Tensor:
    """The k best experts of every token, best first: int64 (T, k).

    Ties go to the lowest index (`torch.topk` leaves them open; `argmax` does not).
    Raises ValueError when there are fewer than k experts.
    """
    if k > score_TE.shape[1]:
        raise ValueError(f"top-k ({k}) must not exceed the number of experts ({score_TE.shape[1]})")
    remaining_TE = score_TE.detach().clone()
    chosen = []
    for _ in range(k):
        best_T1 = remaining_TE.argmax(dim=-1, keepdim=True)
        chosen.append(best_T1)
        remaining_TE.scatter_(1, best_T1, -torch.inf)
    return torch.cat(chosen, dim=1)


def topk(logits_TE: Tensor, valid_T: Tensor, k: int, renormalize: bool) -> Routing:
    """Softmax, then the k most probable experts.

    `renormalize` divides the chosen probabilities by their sum (Mixtral, 2401.04088: true;
    OLMoE, 2409.02060: false).
    """
    prob_TE = logits_TE.softmax(dim=-1)
    expert_TK = choose(prob_TE, k)
    gate_TK = prob_TE.gather(1, expert_TK)
    if renormalize:
        gate_TK = gate_TK / gate_TK.sum(dim=-1, keepdim=True)
    sampled_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    return Routing(expert_TK, gate_TK, prob_TE, logits_TE, sampled_TK, valid_T)


def switch(logits_TE: Tensor, valid_T: Tensor) -> Routing:
    """The single most probable expert, weighted by its probability (2101.03961 §2.1)."""
    return topk(logits_TE, valid_T, k=1, renormalize=False)


def gshard(logits_TE: Tensor, valid_T: Tensor, uniform_T: Tensor | None) -> Routing:
    """Top-2 gating with a random second expert (2006.16668, Algorithm 1).

    Gates are renormalised by g1 + g2 before anything is dropped. With `uniform_T` (U[0, 1), one
    draw a token) the second expert is kept with probability min(1, 2·g2); without, always.
    A second choice that is not sampled asks for no slot: Lingvo's reading. (The paper's listing
    advances the expert's counter either way.)
    """
    routing = topk(logits_TE, valid_T, k=2, renormalize=True)
    if uniform_T is None:
        return routing
    sampled_TK = routing.sampled_TK.clone()
    sampled_TK[:, 1] = uniform_T < 2 * routing.gate_TK[:, 1].detach()
    return routing._replace(sampled_TK=sampled_TK)
