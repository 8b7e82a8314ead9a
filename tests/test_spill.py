"""The drop policy spill: who goes on to which expert, and at what weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from strategies import GATES, MANY, Case, cases, close, gradients, topk_record
from torch import Tensor

from moetrain.moe import OUTCOMES, Ledger, Routing, routing
from moetrain.moe.capacity import plan_capacity
from moetrain.moe.ledger import ledger
from moetrain.moe.spill import spill


def ranking(orders: list[tuple[int, ...]], k: int, valid: list[bool] | None = None) -> Routing:
    """Tokens that rank the experts in the orders given, with logits E, E − 1, ..., 1."""
    experts = len(orders[0])
    logits_TE = torch.empty(len(orders), experts, dtype=torch.float64)
    for t, order in enumerate(orders):
        logits_TE[t, list(order)] = torch.arange(experts, 0, -1, dtype=torch.float64)
    return topk_record(logits_TE, k, valid)


def outcomes(book: Ledger) -> dict[str, int]:
    totals = book.outcome_EKO.sum((0, 1)).tolist()
    return {name: n for name, n in zip(OUTCOMES, totals, strict=True) if n}


# ---- tables: who goes where, and why -------------------------------------------------------------


def test_four_tokens_one_slot_each() -> None:
    """All four want expert 0; token 0 has it. Round 1: tokens 1 and 2 rank expert 1 next and token
    3 ranks expert 2, so 1 takes expert 1, 2 finds it taken, 3 takes expert 2. With a second round
    token 2 goes on to expert 2, taken, and no further: it is lost. A third would bring it to
    expert 3."""
    record = ranking([(0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3), (0, 2, 1, 3)], k=1)
    expected = {1: [0, 1, 4, 2], 2: [0, 1, 4, 2], 3: [0, 1, 3, 2]}
    for depth, experts in expected.items():
        settled = spill(record, group_size=4, slots=1, depth=depth)
        assert settled.expert_TK.flatten().tolist() == experts, depth


def test_within_a_round_the_earlier_token_goes_first() -> None:
    """Experts 0 and 1 are full after tokens 0 and 1. Tokens 2 and 3 both ask for expert 2 next, and
    token order decides; no gate does (token 3's would be higher)."""
    logits_TE = torch.tensor([[9.0, 0, 0], [0, 9, 0], [3, 1, 2], [9, 1, 8]], dtype=torch.float64)
    settled = spill(topk_record(logits_TE, 1), group_size=4, slots=1, depth=1)
    assert settled.expert_TK.flatten().tolist() == [0, 1, 2, 3]


def test_a_round_is_finished_before_the_next_begins() -> None:
    """Expert 0 is full with token 0. In round 1 token 1 asks for expert 1, which token 3's first
    choice holds, and token 2 for expert 2. In round 2 token 1 asks for expert 2 as well: too late,
    though it comes before token 2."""
    record = ranking([(0, 1, 2), (0, 1, 2), (0, 2, 1), (1, 0, 2)], k=1)
    settled = spill(record, group_size=4, slots=1, depth=2)
    assert settled.expert_TK.flatten().tolist() == [0, 3, 2, 1]


def test_first_choices_spill_before_second_choices() -> None:
    """Two slots each. Tokens 0 and 1 hold expert 0 and (second choices) expert 1; token 2 loses
    both. Its first choice asks for expert 2 and its second for expert 3, not for expert 2 again."""
    record = ranking([(0, 1, 2, 3)] * 3, k=2)
    settled = spill(record, group_size=3, slots=2, depth=1)
    assert settled.expert_TK.tolist() == [[0, 1], [0, 1], [2, 3]]


def test_a_token_never_asks_an_expert_twice() -> None:
    """One slot each, three tokens of one ranking. First choices: token 1 takes expert 2; token 2 is
    turned away there, and takes 3 in the second round. Second choices go on from where each token
    stopped: token 1 asks 3, full, while token 2 asks 4 and gets it; in the second round token 1
    asks 4, and is lost."""
    record = ranking([(0, 1, 2, 3, 4)] * 3, k=2)
    settled = spill(record, group_size=3, slots=1, depth=2)
    assert settled.expert_TK.tolist() == [[0, 1], [2, 5], [3, 4]]


def test_a_choice_does_not_spill_to_the_tokens_other_choice() -> None:
    """Expert 1 has room for two, but it is token 1's own second choice: the first asks for
    expert 2."""
    record = ranking([(0, 2, 1), (0, 1, 2)], k=2)
    settled = spill(record, group_size=2, slots=1, depth=1)
    assert settled.expert_TK.tolist() == [[0, 2], [3, 1]]
    assert outcomes(ledger(record, settled, plan_capacity(settled, 2, 1))) == {
        "kept": 3,
        "dropped": 1,
    }


def test_what_was_not_sampled_does_not_spill() -> None:
    record = ranking([(0, 1, 2), (0, 1, 2)], k=2)
    sampled_TK = torch.tensor([[True, True], [True, False]])
    record = record._replace(sampled_TK=sampled_TK)
    settled = spill(record, group_size=2, slots=1, depth=1)
    book = ledger(record, settled, plan_capacity(settled, 2, 1))
    assert outcomes(book) == {"kept": 2, "spilled": 1, "not_sampled": 1}
    assert book.row_E.tolist() == [1, 1, 1]


def test_padding_neither_spills_nor_stands_in_the_way() -> None:
    """Token 1 is padding: token 2, not token 1, takes the free slot of expert 1."""
    record = ranking([(0, 1), (0, 1), (0, 1)], k=1, valid=[True, False, True])
    settled = spill(record, group_size=3, slots=1, depth=1)
    plan = plan_capacity(settled, 3, 1)
    assert plan.row_TK.flatten().tolist() == [0, 2, 1]


def test_groups_spill_apart() -> None:
    """Each group of two has its own slot at every expert."""
    record = ranking([(0, 1)] * 4, k=1)
    settled = spill(record, group_size=2, slots=1, depth=1)
    assert settled.expert_TK.flatten().tolist() == [0, 1, 0, 1]


def test_closed_experts_are_never_asked() -> None:
    """Four experts in two nodes, one open: both tokens may use experts 0 and 1 only, so of three
    tokens with one slot each the third has nowhere to go."""
    logits_TE = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 3, dtype=torch.float64)
    every, zero_E = torch.ones(3, dtype=torch.bool), torch.zeros(4, dtype=torch.float64)
    record = routing.sigmoid(logits_TE, zero_E, every, 1, num_groups=2, top_groups=1)
    settled = spill(record, group_size=3, slots=1, depth=3)
    assert settled.expert_TK.flatten().tolist() == [0, 1, 4]


def test_the_bias_decides_where_a_choice_spills_and_the_probability_what_it_weighs() -> None:
    """Scores .8 .6 .4 with bias 0 0 .3: after expert 0 comes expert 2. Weight: 1·.4/.8."""
    logits_TE = torch.logit(torch.tensor([[0.8, 0.6, 0.4]] * 2, dtype=torch.float64))
    every, bias_E = torch.ones(2, dtype=torch.bool), torch.tensor([0.0, 0.0, 0.3]).double()
    record = routing.sigmoid(logits_TE, bias_E, every, 1)
    settled = spill(record, group_size=2, slots=1, depth=1)
    assert settled.expert_TK.flatten().tolist() == [0, 2]
    close(settled.gate_TK, torch.tensor([[1.0], [0.5]], dtype=torch.float64))


def test_the_weight_is_the_gate_lost_times_the_ratio_of_probabilities() -> None:
    """Probabilities .4 .3 .2 .1, K = 2, renormalised gates 4/7 and 3/7. Token 1 loses both; its
    first choice weighs 4/7·.2/.4 at expert 2, its second 3/7·.1/.3 at expert 3."""
    logits_TE = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 2, dtype=torch.float64).log()
    settled = spill(topk_record(logits_TE, 2), group_size=2, slots=1, depth=1)
    assert settled.expert_TK.tolist() == [[0, 1], [2, 3]]
    expected = [[4 / 7, 3 / 7], [2 / 7, 1 / 7]]
    close(settled.gate_TK, torch.tensor(expected, dtype=torch.float64))


def test_tokens_that_no_expert_chose_have_nothing_to_spill() -> None:
    """Experts that choose drop nothing: the routing stays as it is."""
    logits_TE = torch.tensor([[5.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    record = routing.expert_choice(logits_TE, torch.ones(2, dtype=torch.bool), 2, 1)
    settled = spill(record, group_size=2, slots=1, depth=2)
    assert torch.equal(settled.expert_TK, record.expert_TK)
    assert torch.equal(settled.gate_TK, record.gate_TK)


def test_a_weight_never_grows_by_spilling() -> None:
    """Its bias alone made an expert the first choice; its sigmoid has underflowed."""
    logits_TE = torch.tensor([[-300.0, -5.0]] * 2)
    every, bias_E = torch.ones(2, dtype=torch.bool), torch.tensor([9.0, 0.0])
    logits_TE.requires_grad_()
    settled = spill(routing.sigmoid(logits_TE, bias_E, every, 1), 2, 1, 1)
    assert settled.expert_TK.flatten().tolist() == [0, 1]
    assert settled.gate_TK.tolist() == [[1.0], [1.0]]
    assert gradients(settled.gate_TK.sum(), [logits_TE])[0].isfinite().all()


# ---- against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GATES)
def test_experts_and_weights_agree_with_the_oracle(kind: str) -> None:
    """Also the gradients of the weights, of spilled and of kept choices."""

    @settings(MANY, max_examples=20)
    @given(case=cases(kind, dropless=False, policy="spill"))
    def agree(case: Case) -> None:
        leaves = case.leaves()
        _, settled, plan = case.settle(case.route(leaves))
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        for t, verdicts in enumerate(case.answer(leaves).verdicts):
            for k, verdict in enumerate(verdicts or ()):
                has_row = bool(plan.row_TK[t, k] < plan.source_R.numel())
                assert has_row == (verdict.expert is not None)
                if verdict.gate is not None:
                    assert settled.expert_TK[t, k] == verdict.expert
                    ours.append(settled.gate_TK[t, k])
                    theirs.append(verdict.gate)
        if ours:
            close(torch.stack(ours), torch.stack(theirs))
            weight = case.normals(len(ours), stream=20)
            totals = [(weight * torch.stack(gates)).sum() for gates in (ours, theirs)]
            pairs = zip(*(gradients(total, list(leaves.values())) for total in totals), strict=True)
            for mine, judged in pairs:
                close(mine, judged)

    agree()


@MANY
@given(case=cases(dropless=False, policy="spill"))
def test_nobody_loses_in_a_plan_of_what_was_settled(case: Case) -> None:
    """What spilled fits, and nothing is dropped where an expert that may be asked has room."""
    record, settled, plan = case.settle(case.route(case.leaves()))
    asks_TK = settled.asks_TK & settled.sampled_TK
    assert torch.equal(plan.row_TK < plan.source_R.numel(), asks_TK)
    for chosen in settled.expert_TK[settled.valid_T].tolist():
        real = [e for e in chosen if e < case.experts]
        assert len(set(real)) == len(real), "no token visits an expert twice"
    assert torch.equal(settled.sampled_TK, record.sampled_TK)
