"""What is kept of a routing decides as the routing did."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import MANY, Case, asking, cases

from moetrain.moe import Routing, routing
from moetrain.moe.preferences import preferences, routing_of


def kept(record: Routing, num_ranked: int) -> Routing:
    """There and back again."""
    noted = preferences(record, num_ranked)
    return routing_of(noted, record.num_experts, noted.top_k)


@settings(MANY, max_examples=80)
@given(case=cases())
def test_it_is_planned_as_the_routing_is(case: Case) -> None:
    record = case.route(case.leaves())
    ours = case.settle(kept(record, case.router.k * (1 + case.depth)))
    theirs = case.settle(record)
    assert torch.equal(ours.settled.expert_TK, theirs.settled.expert_TK)
    assert torch.equal(ours.plan.row_TK, theirs.plan.row_TK)
    for mine, other in zip(ours.ledger, theirs.ledger, strict=True):
        assert torch.equal(mine, other)


@settings(MANY, max_examples=20)
@given(case=cases(kind="topk"), data=st.data())
def test_another_number_of_choices_is_what_the_gate_would_have_chosen(
    case: Case, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, case.experts))
    leaves, renormalize = case.leaves(), case.router.renormalize
    noted = preferences(case.route(leaves), case.experts)
    ours = routing_of(noted, case.experts, k, renormalize)
    other = dataclasses.replace(case, router=dataclasses.replace(case.router, k=k))
    theirs = other.route(leaves)
    assert torch.equal(ours.expert_TK, theirs.expert_TK)
    torch.testing.assert_close(ours.gate_TK, theirs.gate_TK.detach(), rtol=1e-6, atol=1e-7)


def test_closed_experts_are_nobodys_next_choice() -> None:
    """Two groups of two experts, of which a token may use one: it ranks nothing of the other."""
    logits_TE = torch.tensor([[3.0, 1, 2, 2], [0, 1, 5, 4]])
    record = routing.sigmoid(
        logits_TE, torch.zeros(4), torch.ones(2, dtype=torch.bool), 1, num_groups=2
    )
    found = preferences(record, 4)
    assert found.expert_TX.tolist() == [[0, 1, 4, 4], [2, 3, 4, 4]]
    assert (found.weight_TX[:, 2:] == 0).all()


def test_it_is_compact() -> None:
    logits_TE = asking([(1, 0), (2, 1)], experts=3)
    valid_T = torch.tensor([True, False])
    half = preferences(routing.topk(logits_TE.float(), valid_T, 2, True), 2)
    assert [part.dtype for part in half] == [torch.uint8, torch.bfloat16, torch.bool, torch.bool]
    assert half.expert_TX.tolist() == [[1, 0], [2, 1]]
    whole = preferences(routing.topk(logits_TE, valid_T, 2, True), 9)
    assert whole.weight_TX.dtype == torch.float32
    assert whole.expert_TX.tolist() == [[1, 0, 2], [2, 1, 0]]
    for experts, dtype in ((255, torch.uint8), (256, torch.int16), (40_000, torch.int32)):
        record = routing.switch(torch.zeros(1, experts), valid_T[:1])
        assert preferences(record, 1).expert_TX.dtype == dtype


@pytest.mark.parametrize("k", [1, 2])
def test_an_expert_beyond_the_choices_weighs_as_it_is_probable(k: int) -> None:
    logits_TE = torch.tensor([[0.5, 0.25, 0.25]]).log().double()
    record = routing.topk(logits_TE, torch.ones(1, dtype=torch.bool), k, renormalize=True)
    share = 1 if k == 1 else 2 / 3
    expected = torch.tensor([[share, share / 2, share / 2]])
    torch.testing.assert_close(preferences(record, 3).weight_TX, expected)
