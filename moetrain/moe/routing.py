"""Gates: router logits -> Routing, one pure function per algorithm.

Shape suffixes: T tokens on this rank, E experts, K choices per token, A groups of experts with e
each, M of them open to a token, k choices inside each of those, G routing groups, S tokens of one,
N assignments of one.
A gate knows nothing of capacity or transport; its record is all that they need. Given the choices
that an earlier pass made (`chosen_TK`), it weighs those instead of choosing anew, so that
recomputation cannot route otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    """Which experts every token chose, and with what weight."""

    expert_TK: Tensor
    """int64: the chosen experts, best first; the lowest index wins a tie. E: no such choice."""
    gate_TK: Tensor
    """fp32 (fp64 for fp64 logits): the weight of each expert's output; differentiable."""
    prob_TE: Tensor
    """How probable each expert is; sums to 1; differentiable."""
    logits_TE: Tensor
    """What the router said."""
    score_TE: Tensor
    """What the choices were ranked by; an expert at −inf must not be chosen. No gradient."""
    sampled_TK: Tensor
    """bool: False where a choice was not sampled, so that it asks for no slot."""
    valid_T: Tensor
    """bool: False for padding, which takes no slot and enters no statistic."""
    load_TE: Tensor | None = None
    """noisy_topk: the probability that a new draw of an expert's noise would choose it."""

    @property
    def num_experts(self) -> int:
        """E, of which an `expert_TK` of that value means none."""
        return self.prob_TE.shape[1]

    @property
    def asks_TK(self) -> Tensor:
        """bool: assignments, i.e. choices of valid tokens, sampled or not."""
        return (self.expert_TK < self.num_experts) & self.valid_T[:, None]


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


def occurrences(expert_GN: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs in each row, where E means none: int64 (G, E)."""
    count_GE = expert_GN.new_zeros(len(expert_GN), num_experts + 1)
    count_GE.scatter_add_(1, expert_GN, torch.ones_like(expert_GN))
    return count_GE[:, :num_experts]


def comparable(weight: Tensor) -> Tensor:
    """Weights by which tokens are ranked against each other: in half the precision, no gradient.

    Tokens that repeat have equal weights but for rounding, and rounding depends on the layout. In
    half the precision they tie, and the order of tokens decides.
    """
    half = torch.float32 if weight.dtype == torch.float64 else torch.bfloat16
    return weight.detach().to(half).to(weight.dtype)


def _record(
    expert_TK: Tensor,
    gate_TK: Tensor,
    prob_TE: Tensor,
    logits_TE: Tensor,
    valid_T: Tensor,
    score_TE: Tensor | None = None,
) -> Routing:
    """A routing in which every choice is sampled, ranked by probability unless scores are given."""
    score_TE = prob_TE if score_TE is None else score_TE
    sampled_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    return Routing(expert_TK, gate_TK, prob_TE, logits_TE, score_TE.detach(), sampled_TK, valid_T)


def topk(
    logits_TE: Tensor,
    valid_T: Tensor,
    k: int,
    renormalize: bool,
    chosen_TK: Tensor | None = None,
) -> Routing:
    """Softmax, then the k most probable experts.

    `renormalize` divides the chosen probabilities by their sum (Mixtral, 2401.04088: true;
    OLMoE, 2409.02060: false).
    """
    prob_TE = logits_TE.softmax(dim=-1)
    expert_TK = choose(prob_TE, k) if chosen_TK is None else chosen_TK
    gate_TK = prob_TE.gather(1, expert_TK)
    if renormalize:
        gate_TK = gate_TK / gate_TK.sum(dim=-1, keepdim=True)
    return _record(expert_TK, gate_TK, prob_TE, logits_TE, valid_T)


def switch(logits_TE: Tensor, valid_T: Tensor, chosen_TK: Tensor | None = None) -> Routing:
    """The single most probable expert, weighted by its probability (2101.03961 §2.1)."""
    return topk(logits_TE, valid_T, 1, renormalize=False, chosen_TK=chosen_TK)


def gshard(
    logits_TE: Tensor,
    valid_T: Tensor,
    uniform_T: Tensor | None,
    chosen_TK: Tensor | None = None,
) -> Routing:
    """Top-2 gating with a random second expert (2006.16668, Algorithm 1).

    Gates are renormalised by g1 + g2 before anything is dropped. With `uniform_T` (U[0, 1), one
    draw a token) the second expert is kept with probability min(1, 2·g2); without, always.
    A second choice that is not sampled asks for no slot: Lingvo's reading. (The paper's listing
    advances the expert's counter either way.)
    """
    routing = topk(logits_TE, valid_T, 2, renormalize=True, chosen_TK=chosen_TK)
    if uniform_T is None:
        return routing
    sampled_TK = routing.sampled_TK.clone()
    sampled_TK[:, 1] = uniform_T < 2 * routing.gate_TK[:, 1].detach()
    return routing._replace(sampled_TK=sampled_TK)


def dense(logits_TE: Tensor, valid_T: Tensor) -> Routing:
    """Every expert for every token, weighted by the softmax; choices in the order of experts."""
    prob_TE = logits_TE.softmax(dim=-1)
    expert_TE = torch.arange(prob_TE.shape[1], device=prob_TE.device).expand_as(prob_TE)
    return _record(expert_TE.contiguous(), prob_TE, prob_TE, logits_TE, valid_T)


def noisy_topk(
    clean_TE: Tensor,
    raw_std_TE: Tensor,
    valid_T: Tensor,
    k: int,
    normal_TE: Tensor | None,
    chosen_TK: Tensor | None = None,
) -> Routing:
    """Top-k of noisy logits H = clean + normal·softplus(raw_std), gates softmax over the k kept.

    1701.06538 eq. 3-5; without `normal_TE` there is no noise. `load_TE` is P(x, i) of its eq. 8-9:
    Φ((clean_i − kth_excl(H, k, i)) / std_i), and 1 where k = E leaves nothing to win against.
    """
    # (clean − threshold)/std² must not overflow: the gradient is that times a density of 0
    std_TE = F.softplus(raw_std_TE).clamp(min=torch.finfo(raw_std_TE.dtype).tiny ** 0.25)
    noisy_TE = clean_TE if normal_TE is None else clean_TE + normal_TE * std_TE
    expert_TK = choose(noisy_TE, k) if chosen_TK is None else chosen_TK
    gate_TK = noisy_TE.gather(1, expert_TK).softmax(dim=-1)
    load_TE = _probability_in_top_k(clean_TE, noisy_TE, std_TE, expert_TK)
    record = _record(expert_TK, gate_TK, noisy_TE.softmax(dim=-1), noisy_TE, valid_T, noisy_TE)
    return record._replace(load_TE=load_TE)


def _probability_in_top_k(
    clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, expert_TK: Tensor
) -> Tensor:
    if expert_TK.shape == clean_TE.shape:
        return torch.ones_like(clean_TE)
    is_chosen_TE = _one_hot(expert_TK, clean_TE.shape[1])
    best_other_T1 = choose(noisy_TE.masked_fill(is_chosen_TE, -torch.inf), 1)
    # the k-th largest of the others: for a chosen expert that is the best one not chosen
    threshold_TE = torch.where(
        is_chosen_TE, noisy_TE.gather(1, best_other_T1), noisy_TE.gather(1, expert_TK[:, -1:])
    )
    return torch.special.ndtr((clean_TE - threshold_TE) / std_TE)


def sigmoid(
    logits_TE: Tensor,
    bias_E: Tensor,
    valid_T: Tensor,
    k: int,
    scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
    chosen_TK: Tensor | None = None,
) -> Routing:
    """DeepSeek-V3's gate (2412.19437 eq. 12-16): sigmoid scores, a bias that only the choice sees.

    Chooses the top k of s + b, weighted by scale·s/Σ_chosen s. With `num_groups` > 1 (consecutive
    groups of experts: nodes) only the best `top_groups` of them are open to a token, ranked by the
    sum of their best k/top_groups scores. `prob_TE` is s divided by its sum over all experts.
    """
    log_TE = F.logsigmoid(logits_TE)  # s/Σs as a softmax of log s, which cannot divide by 0
    # torch.sigmoid rounds by an element's place in memory, which would break ties by layout
    biased_TE = log_TE.detach().exp() + bias_E
    if num_groups > 1 and chosen_TK is None:
        biased_TE = _limit_to_groups(biased_TE, num_groups, top_groups, k // top_groups)
    expert_TK = choose(biased_TE, k) if chosen_TK is None else chosen_TK
    gate_TK = scale * log_TE.gather(1, expert_TK).softmax(dim=-1)
    return _record(expert_TK, gate_TK, log_TE.softmax(dim=-1), logits_TE, valid_T, biased_TE)


def _limit_to_groups(score_TE: Tensor, num_groups: int, top_groups: int, best: int) -> Tensor:
    """The scores, −inf outside each token's `top_groups` groups with the highest best scores."""
    score_TAe = score_TE.unflatten(1, (num_groups, -1))
    strength_TA = score_TAe.topk(best, dim=-1).values.sum(dim=-1)
    is_open_TA = _one_hot(choose(strength_TA, top_groups), num_groups)
    return score_TAe.masked_fill(~is_open_TA[:, :, None], -torch.inf).flatten(1)


def _one_hot(index_TK: Tensor, size: int) -> Tensor:
    """bool (T, size): which indices occur in a row."""
    empty = torch.zeros(len(index_TK), size, dtype=torch.bool, device=index_TK.device)
    return empty.scatter(1, index_TK, True)


def hierarchical(
    outer_TA: Tensor,
    inner_TE: Tensor,
    valid_T: Tensor,
    k: int,
    top_groups: int,
    renormalize: bool,
    chosen_TK: Tensor | None = None,
) -> Routing:
    """Two levels (1701.06538 App. B): a gate over groups of experts, and one inside each group.

    Softmax over the A groups and over the E/A consecutive experts of each; the best `top_groups`
    groups, and the best k/top_groups experts inside each of those. A choice weighs the product of
    its two gates, each divided by the sum of those chosen at its level where `renormalize`.
    Choices are ordered by weight. `prob_TE` is the product of the two probabilities.
    """
    size = inner_TE.shape[1] // outer_TA.shape[1]
    outer_prob_TA = outer_TA.softmax(dim=-1)
    inner_prob_TE = inner_TE.unflatten(1, (-1, size)).softmax(dim=-1).flatten(1)
    shared_by = top_groups if renormalize else None
    expert_TK = chosen_TK
    if expert_TK is None:
        levels = outer_prob_TA.detach(), inner_prob_TE.detach()
        by_index_TK = _choose_in_groups(*levels, k, top_groups)
        gate_TK = _weigh_levels(*levels, by_index_TK, shared_by)
        by_gate_TK = gate_TK.sort(dim=1, descending=True, stable=True).indices
        expert_TK = by_index_TK.gather(1, by_gate_TK)
    # Not views: FSDP2 hangs its hooks on what a layer returns, and warns of views.
    prob_TE = outer_prob_TA.repeat_interleave(size, 1) * inner_prob_TE
    logits_TE = outer_TA.repeat_interleave(size, 1) + inner_TE
    gate_TK = _weigh_levels(outer_prob_TA, inner_prob_TE, expert_TK, shared_by)
    return _record(expert_TK, gate_TK, prob_TE, logits_TE, valid_T)


def _choose_in_groups(
    outer_prob_TA: Tensor, inner_prob_TE: Tensor, k: int, top_groups: int
) -> Tensor:
    """The best experts of the best groups, by index, so that a stable sort settles ties by it."""
    size = inner_prob_TE.shape[1] // outer_prob_TA.shape[1]
    group_TM = choose(outer_prob_TA, top_groups)
    inner_prob_TAe = inner_prob_TE.unflatten(1, (-1, size))
    within_TMe = inner_prob_TAe.gather(1, group_TM[:, :, None].expand(-1, -1, size))
    place_TMk = choose(within_TMe.flatten(0, 1), k // top_groups).unflatten(0, group_TM.shape)
    return (group_TM[:, :, None] * size + place_TMk).flatten(1).sort(dim=1).values


def _weigh_levels(
    outer_prob_TA: Tensor, inner_prob_TE: Tensor, expert_TK: Tensor, shared_by: int | None
) -> Tensor:
    """The product of both levels' gates; each first divided by the sum over the groups chosen, and
    over the choices in the same group, where the gates are `shared_by` so many groups."""
    group_TK = expert_TK // (inner_prob_TE.shape[1] // outer_prob_TA.shape[1])
    outer_TK, inner_TK = outer_prob_TA.gather(1, group_TK), inner_prob_TE.gather(1, expert_TK)
    if shared_by is not None:
        per_group = group_TK.shape[1] // shared_by
        outer_TK = per_group * outer_TK / outer_TK.sum(dim=-1, keepdim=True)
        is_same_TKK = group_TK[:, :, None] == group_TK[:, None, :]
        inner_TK = inner_TK / inner_TK[:, None, :].where(is_same_TKK, 0).sum(dim=-1)
    return outer_TK * inner_TK


def expert_choice(
    logits_TE: Tensor,
    valid_T: Tensor,
    group_size: int,
    slots: int,
    chosen_TE: Tensor | None = None,
) -> Routing:
    """Every expert takes the `slots` tokens of a group that want it most (2202.09368 §3.2).

    The earlier token wins a tie, `comparable` saying what ties.
    A token's weight for an expert is its softmax over experts. Any number of experts may take it,
    so K = E; those that did come first, by weight, and the choices it lacks are E. An expert sees
    the whole group, so a token's experts depend on later tokens.
    """
    prob_TE = logits_TE.softmax(dim=-1)
    expert_TE = chosen_TE
    if expert_TE is None:
        expert_TE = _taken_by_experts(prob_TE.detach(), valid_T, group_size, slots)
    is_taken_TE = expert_TE < prob_TE.shape[1]
    gate_TE = prob_TE.gather(1, expert_TE.where(is_taken_TE, 0)).where(is_taken_TE, 0)
    return _record(expert_TE, gate_TE, prob_TE, logits_TE, valid_T)


def _taken_by_experts(prob_TE: Tensor, valid_T: Tensor, group_size: int, slots: int) -> Tensor:
    """The experts that take each token, best first, E for the rest: int64 (T, E)."""
    num_experts = prob_TE.shape[1]
    wanted_TE = comparable(prob_TE).masked_fill(~valid_T[:, None], -torch.inf)
    wanted_GSE = wanted_TE.unflatten(0, (-1, group_size))
    order_GSE = wanted_GSE.sort(dim=1, descending=True, stable=True).indices
    taken_GSE = torch.zeros_like(wanted_GSE, dtype=torch.bool)
    taken_GSE.scatter_(1, order_GSE[:, :slots], True)
    taken_TE = taken_GSE.flatten(0, 1) & valid_T[:, None]
    order_TE = prob_TE.where(taken_TE, -1).sort(dim=1, descending=True, stable=True).indices
    return order_TE.where(taken_TE.gather(1, order_TE), num_experts)


def ranked(score_TE: Tensor, valid_T: Tensor, k: int) -> Routing:
    """The k best of given scores, weighing 1/k each: the gates without a router.

    `hash` (2106.04426) and `random` score by keyed hashes, `balanced` by distance.
    """
    uniform_TE = torch.full_like(score_TE, 1 / score_TE.shape[1])
    gate_TK = torch.full_like(score_TE[:, :k], 1 / k)
    expert_TK = choose(score_TE, k)
    return _record(expert_TK, gate_TK, uniform_TE, uniform_TE.log(), valid_T, score_TE)


def round_robin(position_T: Tensor, num_experts: int, k: int) -> Tensor:
    """Scores (T, E), fp32, with which position p chooses the experts p·k, p·k + 1, ... mod E."""
    expert_E = torch.arange(num_experts, device=position_T.device)
    return -((expert_E - position_T[:, None] * k) % num_experts).to(torch.float32)
