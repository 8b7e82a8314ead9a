"""Our gates against DeepSpeed's, on the same logits and the same numbers of slots.

Where definitions agree, so must the numbers and their gradients. Where they differ, the difference
is asserted too, and its cause is named: docs/peers.md lists them.

Shape suffixes: T tokens (one routing group), E experts, C slots of an expert, K choices, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peers import (
    FIXED,
    balance_of,
    close,
    descending,
    every,
    renormalised_after_drops,
    same_gradient,
    selection,
    table,
    weighted,
)
from torch import Tensor

from moetrain.moe import Gate, MoE, Plan, Routing, capacity, routing
from moetrain.moe.capacity import plan_capacity


@pytest.fixture(scope="module")
def deepspeed() -> ModuleType:
    from deepspeed.moe import sharded_moe

    return sharded_moe


@dataclass(frozen=True)
class Case:
    """The shape of one routing group and the seed of its numbers.

    Tokens and experts are powers of two, so that DeepSpeed's fp32 arithmetic of shares and
    capacities is exact.
    """

    tokens: int
    experts: int
    k: int
    factor: float
    seed: int

    @property
    def slots(self) -> int:
        return capacity(self.tokens, self.experts, self.k, self.factor, min_capacity=1)

    def logits(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        skew_E = torch.linspace(0, 2, self.experts)  # some experts overflow
        logits_TE = torch.randn(self.tokens, self.experts, generator=generator) + skew_E
        return logits_TE.requires_grad_()


@st.composite
def cases(draw: st.DrawFn, k: int | None = None) -> Case:
    return Case(
        tokens=draw(st.sampled_from([8, 16, 64])),
        experts=draw(st.sampled_from([4, 8, 16])),
        k=k or draw(st.integers(2, 4)),
        factor=draw(st.sampled_from([0.25, 0.5, 1.0, 1.25, 2.0])),
        seed=draw(st.integers(0, 10_000)),
    )


def ours(record: Routing, plan: Plan, slots: int, gate_TK: Tensor | None = None) -> Tensor:
    """`table` of a plan of one routing group."""
    kept_TK = plan.row_TK < plan.source_R.numel()
    expert_TK = record.expert_TK.where(kept_TK, -1)
    gate_TK = record.gate_TK if gate_TK is None else gate_TK
    return table(expert_TK, plan.row_TK % slots, gate_TK, record.num_experts, slots)


def sparse(answer: tuple[Any, ...]) -> Tensor:
    """`table` of DeepSpeed's index form: (l_aux, C, E, experts, slots, gates, counts)."""
    _, slots, experts, expert_KT, slot_KT, gate_KT, _ = answer
    used = min(int(slots), expert_KT.shape[1])  # it provides more slots than tokens can fill
    return table(expert_KT.T.long(), slot_KT.T.long(), gate_KT.T, experts, used)


# ---- capacity ------------------------------------------------------------------------------------


def their_slots(deepspeed: ModuleType, tokens: int, experts: int, factor: float, least: int) -> int:
    gates_TE = torch.empty(tokens, experts)
    return int(deepspeed._capacity(gates_TE, torch.tensor(factor), torch.tensor(least)))


def test_deepspeed_counts_the_same_slots(deepspeed: ModuleType) -> None:
    """Its factor is multiplied by K by its gates."""

    @FIXED
    @given(case=cases(), least=st.integers(1, 8))
    def agree(case: Case, least: int) -> None:
        theirs = their_slots(deepspeed, case.tokens, case.experts, case.factor * case.k, least)
        shape = (case.tokens, case.experts, case.k)
        assert min(theirs, case.tokens) == capacity(*shape, case.factor, least)

    agree()


def test_deepspeed_rounds_a_capacity_up_once_too_often(deepspeed: ModuleType) -> None:
    """1.2·100/2 is 60; in fp32 1.2 is a little more."""
    assert their_slots(deepspeed, 100, 2, 1.2, least=1) == 61
    assert capacity(100, 2, 1, 1.2, min_capacity=1) == 60


def test_deepspeed_gives_an_expert_more_slots_than_there_are_tokens(deepspeed: ModuleType) -> None:
    assert their_slots(deepspeed, 8, 2, 4.0 * 2, least=1) == 32
    assert capacity(8, 2, 2, 4.0, min_capacity=1) == 8


def test_deepspeed_has_four_slots_at_least(deepspeed: ModuleType) -> None:
    """Its layer's default; ours is 1. Fewer tokens than that it refuses."""
    from deepspeed.moe.layer import MoE as TheirMoE

    assert inspect.signature(TheirMoE).parameters["min_capacity"].default == 4
    assert inspect.signature(MoE).parameters["min_capacity"].default == 1
    assert their_slots(deepspeed, 16, 16, 1.0, least=4) == 4
    with pytest.raises(AssertionError, match="min_capacity"):
        deepspeed.top1gating(torch.zeros(3, 2), 1.0, 4)
    assert capacity(3, 2, 1, 1.0, min_capacity=4) == 3


# ---- one expert a token --------------------------------------------------------------------------


def test_switch_is_deepspeeds_top1_when_its_draws_favour_earlier_tokens(
    deepspeed: ModuleType,
) -> None:
    """Choices, gates, slots, drops, the loss and all gradients, in both forms of its answer."""

    @FIXED
    @given(case=cases(k=1))
    def agree(case: Case) -> None:
        logits_TE = case.logits()
        record = routing.switch(logits_TE, every(case.tokens))
        plan = plan_capacity(record, case.tokens, case.slots)
        mine = ours(record, plan, case.slots)
        with selection(deepspeed, descending(case.tokens, case.experts)):
            answer = deepspeed.top1gating(logits_TE, case.factor, 1, sparse_routes=True)
            l_aux, combine_TEC, mask_TEC, count_E = deepspeed.top1gating(logits_TE, case.factor, 1)
        loss = balance_of(Gate("switch", 1), record)
        close(mine, sparse(answer))
        close(mine, combine_TEC)
        assert torch.equal(mine > 0, mask_TEC)
        assert torch.equal(record.expert_TK.flatten().bincount(minlength=case.experts), count_E)
        close(loss, l_aux)
        same_gradient(loss, l_aux, logits_TE)
        same_gradient(weighted(mine), weighted(combine_TEC), logits_TE)

    agree()


def test_drop_policy_random_is_deepspeeds_random_token_selection(deepspeed: ModuleType) -> None:
    """By the same draws the same tokens stay. Slots differ: by draw here, by position there."""

    @FIXED
    @given(case=cases(k=1))
    def agree(case: Case) -> None:
        logits_TE = case.logits()
        generator = torch.Generator().manual_seed(case.seed + 1)
        uniform_TE = torch.rand(case.tokens, case.experts, generator=generator)
        record = routing.switch(logits_TE, every(case.tokens))
        priority_TK = uniform_TE.gather(1, record.expert_TK)
        plan = plan_capacity(record, case.tokens, case.slots, priority_TK)
        with selection(deepspeed, uniform_TE):
            answer = deepspeed.top1gating(logits_TE, case.factor, 1, sparse_routes=True)
        close(ours(record, plan, case.slots).sum(-1), sparse(answer).sum(-1))

    agree()


def test_without_its_draws_deepspeeds_top1_still_drops_out_of_order(deepspeed: ModuleType) -> None:
    """It takes the top C of zeros and ones: the number kept is right, who is kept is open."""
    is_positional = []
    for seed in range(20):
        case = Case(tokens=64, experts=4, k=1, factor=0.5, seed=seed)
        logits_TE = case.logits().detach()
        record = routing.switch(logits_TE, every(case.tokens))
        mine = ours(record, plan_capacity(record, case.tokens, case.slots), case.slots)
        answer = deepspeed.top1gating(logits_TE, 0.5, 1, use_rts=False, sparse_routes=True)
        assert torch.equal((mine > 0).sum((0, 2)), (sparse(answer) > 0).sum((0, 2)))
        is_positional.append(torch.equal(mine > 0, sparse(answer) > 0))
    assert not all(is_positional)


def test_padding_moves_deepspeeds_loss_and_not_ours(deepspeed: ModuleType) -> None:
    """`used_token` keeps padding out of the experts, but its loss averages over all tokens."""
    logits_TE = Case(tokens=16, experts=4, k=1, factor=2.0, seed=3).logits().detach()
    used_T = torch.arange(16) < 8

    def theirs(logits_TE: Tensor, used_T: Tensor | None) -> Tensor:
        return deepspeed.top1gating(logits_TE, 2.0, 1, used_T)[0]

    def mine(logits_TE: Tensor, used_T: Tensor) -> Tensor:
        return balance_of(Gate("switch", 1), routing.switch(logits_TE, used_T))

    close(mine(logits_TE, used_T), mine(logits_TE[:8], every(8)))
    close(mine(logits_TE[:8], every(8)), theirs(logits_TE[:8], None))
    assert theirs(logits_TE, used_T.long()) < 0.6 * theirs(logits_TE[:8], None)
    for gate in (deepspeed.top2gating, deepspeed.topkgating):
        assert "used_token" not in inspect.signature(gate).parameters


# ---- two experts a token -------------------------------------------------------------------------


def test_gshard_is_deepspeeds_top2_until_its_weights_are_renormalised(
    deepspeed: ModuleType,
) -> None:
    """The same choices, slots, drops and loss. It divides by what is kept: converted here.

    The part of the weights that both define alike is compared as it is: tokens that lost nothing.
    """

    @FIXED
    @given(case=cases(k=2))
    def agree(case: Case) -> None:
        logits_TE = case.logits()
        record = routing.gshard(logits_TE, every(case.tokens), None)
        plan = plan_capacity(record, case.tokens, case.slots)
        options = {"top2_2nd_expert_sampling": False}
        answer = deepspeed.top2gating(logits_TE, case.factor, 1, **options, sparse_routes=True)
        l_aux, combine_TEC, _, count_E = deepspeed.top2gating(logits_TE, case.factor, 1, **options)
        mine, theirs = ours(record, plan, case.slots), sparse(answer)
        kept_TK = plan.row_TK < plan.source_R.numel()
        after_TK = renormalised_after_drops(record.gate_TK, kept_TK)
        whole_T = kept_TK.all(1)
        close(theirs, combine_TEC)
        close(mine[whole_T], theirs[whole_T])
        close(ours(record, plan, case.slots, after_TK), theirs)
        same_gradient(weighted(mine[whole_T]), weighted(theirs[whole_T]), logits_TE)
        assert torch.equal(record.expert_TK.flatten().bincount(minlength=case.experts), count_E)
        loss = balance_of(Gate("gshard", 2), record)
        close(loss, l_aux)
        same_gradient(loss, l_aux, logits_TE)

    agree()


def test_deepspeed_gives_weight_one_to_the_expert_that_is_left(deepspeed: ModuleType) -> None:
    """Both want experts 0 and 1 with 0.6 and 0.2; one slot each. Algorithm 1 says 0.6/0.8."""
    logits_TE = torch.tensor([[0.6, 0.2, 0.1, 0.1], [0.2, 0.1, 0.6, 0.1]]).log()
    record = routing.gshard(logits_TE, every(2), None)
    assert record.expert_TK.tolist() == [[0, 1], [2, 0]]
    mine = ours(record, plan_capacity(record, 2, slots=1), 1)
    answer = deepspeed.top2gating(
        logits_TE, 1.0, 1, top2_2nd_expert_sampling=False, sparse_routes=True
    )
    theirs = sparse(answer)
    close(mine.sum(-1), torch.tensor([[0.75, 0.25, 0, 0], [0, 0, 0.75, 0]]))
    close(theirs.sum(-1), torch.tensor([[0.75, 0.25, 0, 0], [0, 0, 1.0, 0]]))


@contextmanager
def gumbel(deepspeed: ModuleType, noise_TE: Tensor) -> Iterator[None]:
    """Let DeepSpeed's draw of a second expert add this noise."""
    with patch.dict(deepspeed.gumbel_map, {torch.device("cpu"): lambda _shape: noise_TE}):
        yield


def test_deepspeed_draws_which_expert_is_second_and_gshard_whether_it_is(
    deepspeed: ModuleType,
) -> None:
    """Algorithm 1 keeps the second best or sends the token to one expert; theirs always sends two,
    the second drawn in proportion to its probability. (It also adds the noise to its argument.)"""
    logits_TE = torch.tensor([[0.6, 0.25, 0.1, 0.05]]).log()
    noise_TE = torch.tensor([[0.0, 0.0, 5.0, 0.0]])
    given_TE = logits_TE.clone()
    with gumbel(deepspeed, noise_TE):
        answer = deepspeed.top2gating(given_TE, 4.0, 1, sparse_routes=True)
    assert answer[3].T.tolist() == [[0, 2]]
    assert torch.equal(given_TE, logits_TE + noise_TE)
    second = 0.25 / 0.85
    for uniform, is_sampled in [(2 * second - 0.01, True), (2 * second + 0.01, False)]:
        record = routing.gshard(logits_TE, every(1), torch.tensor([uniform]))
        assert record.expert_TK.tolist() == [[0, 1]]
        assert record.sampled_TK.tolist() == [[True, is_sampled]]


# ---- K experts a token ---------------------------------------------------------------------------


def raw_topk(case: Case, logits_TE: Tensor) -> Routing:
    return routing.topk(logits_TE, every(case.tokens), case.k, renormalize=False)


@pytest.mark.parametrize("policy", ["position", "probs"])
def test_topk_is_deepspeeds_topk_with_its_order_of_service(
    deepspeed: ModuleType, policy: str
) -> None:
    """Its "probs" is our drop policy probability with gates that are not renormalised; its
    "position" serves tokens in order with all their choices, a priority of −t here. It divides the
    weights by what is kept, and numbers slots by position."""

    @FIXED
    @given(case=cases())
    def agree(case: Case) -> None:
        logits_TE = case.logits()
        record = raw_topk(case, logits_TE)
        served_TK = -torch.arange(case.tokens)[:, None].expand(-1, case.k)
        priority_TK = served_TK if policy == "position" else record.gate_TK
        plan = plan_capacity(record, case.tokens, case.slots, priority_TK)
        arguments = (logits_TE, case.k, case.factor, 1)
        answer = deepspeed.topkgating(*arguments, drop_policy=policy, sparse_routes=True)
        dense = deepspeed.topkgating(*arguments, drop_policy=policy)
        kept_TK = plan.row_TK < plan.source_R.numel()
        gate_TK = renormalised_after_drops(record.gate_TK, kept_TK)
        mine, theirs = ours(record, plan, case.slots, gate_TK), sparse(answer)
        close(theirs, dense[1][:, :, : case.slots])
        if policy == "probs":
            mine, theirs = mine.sum(-1), theirs.sum(-1)
        close(mine, theirs)
        same_gradient(weighted(mine), weighted(theirs), logits_TE)
        loss = balance_of(Gate("topk", case.k), record)
        close(loss, answer[0])
        same_gradient(loss, answer[0], logits_TE)

    agree()


@pytest.mark.parametrize("k", [1, 3])
def test_in_fp64_deepspeeds_index_form_differs_by_rounding_alone(
    deepspeed: ModuleType, k: int
) -> None:
    """Its top-1 and top-K gates; what else it has multiplies by fp32 masks."""
    case = Case(tokens=64, experts=8, k=k, factor=0.5, seed=11)
    logits_TE = case.logits().detach().double()
    record = raw_topk(case, logits_TE)
    if k == 1:
        with selection(deepspeed, descending(case.tokens, case.experts)):
            answer = deepspeed.top1gating(logits_TE, case.factor, 1, sparse_routes=True)
        plan, gate_TK = plan_capacity(record, case.tokens, case.slots), record.gate_TK
    else:
        answer = deepspeed.topkgating(logits_TE, k, case.factor, 1, sparse_routes=True)
        plan = plan_capacity(record, case.tokens, case.slots, record.gate_TK)
        gate_TK = renormalised_after_drops(record.gate_TK, plan.row_TK < plan.source_R.numel())
    mine = ours(record, plan, case.slots, gate_TK).sum(-1)
    assert (mine > 0).sum() < case.tokens * k
    torch.testing.assert_close(mine, sparse(answer).sum(-1), rtol=1e-13, atol=1e-13)
    loss = balance_of(Gate("topk", k), record)
    torch.testing.assert_close(loss, answer[0], rtol=1e-13, atol=0)


def test_deepspeeds_topk_serves_an_early_second_choice_before_a_late_first(
    deepspeed: ModuleType,
) -> None:
    """Expert 1 has one slot; token 0 wants it second, token 1 first. GShard serves token 1."""
    logits_TE = torch.tensor([[3.0, 2.0, 0.0, 0.0], [0.0, 3.0, 2.0, 0.0]])
    record = routing.topk(logits_TE, every(2), 2, renormalize=True)
    mine = ours(record, plan_capacity(record, 2, slots=1), 1) > 0
    answer = deepspeed.topkgating(logits_TE, 2, 1.0, 1, drop_policy="position", sparse_routes=True)
    theirs = sparse(answer) > 0
    assert mine[:, 1, 0].tolist() == [False, True]
    assert theirs[:, 1, 0].tolist() == [True, False]


def test_renormalised_gates_rank_tokens_otherwise_than_deepspeeds_probs(
    deepspeed: ModuleType,
) -> None:
    """For expert 0's one slot, token 0 has the higher probability and token 1 the higher share."""
    logits_TE = torch.tensor([[0.5, 0.45, 0.025, 0.025], [0.4, 0.2, 0.2, 0.2]]).log()
    answer = deepspeed.topkgating(logits_TE, 2, 1.0, 1, sparse_routes=True)
    assert (sparse(answer) > 0)[:, 0, 0].tolist() == [True, False]
    for renormalize, kept in [(False, [True, False]), (True, [False, True])]:
        record = routing.topk(logits_TE, every(2), 2, renormalize)
        plan = plan_capacity(record, 2, slots=1, priority_TK=record.gate_TK)
        assert (ours(record, plan, 1) > 0)[:, 0, 0].tolist() == kept


def test_deepspeeds_topk_of_one_weighs_every_token_by_one(deepspeed: ModuleType) -> None:
    """Renormalised, a single gate is 1 and the router learns nothing from it; its top-1 gate and
    ours weigh by the probability."""
    case = Case(tokens=16, experts=4, k=1, factor=4.0, seed=0)
    logits_TE = case.logits().detach()
    theirs = sparse(deepspeed.topkgating(logits_TE, 1, case.factor, 1, sparse_routes=True))
    record = routing.switch(logits_TE, every(16))
    assert theirs.sum((1, 2)).tolist() == [1.0] * 16
    assert record.gate_TK.max() < 0.999
