"""The drop ledger: every assignment has one outcome, every row one assignment."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import GATES, MANY, POLICIES, Case, Settled, asking, cases, topk_record

from moetrain.moe import OUTCOMES, Ledger
from moetrain.moe.capacity import plan_capacity
from moetrain.moe.ledger import gate_mass, is_conserved, ledger
from moetrain.moe.spill import spill


def book_of(case: Case) -> Ledger:
    return case.settle(case.route(case.leaves())).ledger


def assert_ledger(book: Ledger, expected: oracle.Ledger) -> None:
    outcome_EKO = torch.zeros_like(book.outcome_EKO)
    for (expert, rank, outcome), count in expected.outcomes.items():
        outcome_EKO[expert, rank, OUTCOMES.index(outcome)] = count
    assert all(count.dtype == torch.int64 for count in book)
    assert torch.equal(book.outcome_EKO, outcome_EKO)
    assert book.row_E.tolist() == [expected.rows[e] for e in range(len(book.row_E))]
    counts = (book.assigned, book.tokens, book.lost_tokens, book.slots)
    assert counts == (expected.assigned, expected.tokens, expected.lost_tokens, expected.slots)


# ---- against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [*POLICIES, "dropless"])
@pytest.mark.parametrize("kind", GATES)
def test_ledger_and_gate_mass_agree_with_the_oracle(kind: str, policy: str) -> None:
    dropless = policy == "dropless"

    @settings(MANY, max_examples=6)
    @given(case=cases(kind, dropless, "position" if dropless else policy))
    def agree(case: Case) -> None:
        leaves = case.leaves()
        whole, answer = case.settle(case.route(leaves)), case.answer(leaves)
        assert_ledger(whole.ledger, answer.ledger)
        mass = gate_mass(whole.record, whole.plan)
        assert not any(part.requires_grad for part in mass)
        expected = [answer.ledger.gate_mass, answer.ledger.lost_mass]
        torch.testing.assert_close(torch.stack(mass).tolist(), expected, rtol=1e-10, atol=1e-10)

    agree()


# ---- conservation --------------------------------------------------------------------------------


@settings(MANY, max_examples=80)
@given(case=cases())
def test_every_ledger_is_conserved(case: Case) -> None:
    book = book_of(case)
    assert bool(is_conserved(book))
    outcome_O = dict(zip(OUTCOMES, book.outcome_EKO.sum((0, 1)).tolist(), strict=True))
    assert sum(outcome_O.values()) == book.assigned
    assert book.row_E.sum() == outcome_O["kept"] + outcome_O["spilled"]
    if case.policy != "spill":
        assert torch.equal(book.row_E, book.outcome_EKO[:, :, 0].sum(1))
    if case.router.kind != "expert_choice":
        assert book.assigned == book.tokens * case.router.k
    if case.slots is not None:
        assert (book.row_E <= case.slots * case.groups).all()
    else:
        assert outcome_O["dropped"] == outcome_O["spilled"] == 0
    if case.router.kind != "gshard" or not case.drawn:
        assert outcome_O["not_sampled"] == 0


@settings(MANY, max_examples=80)
@given(
    case=cases(),
    field=st.sampled_from(["outcome_EKO", "assigned", "row_E"]),
    place=st.integers(0, 10**6),
    error=st.sampled_from([-(2**40), -7, -1, 1, 7, 2**40]),
)
def test_a_count_that_is_tampered_with_shows(
    case: Case, field: str, place: int, error: int
) -> None:
    """Any one count of assignments or rows, in any cell, by any amount."""
    book = book_of(case)
    bad = getattr(book, field).clone()
    bad.view(-1)[place % bad.numel()] += error
    assert not bool(is_conserved(book._replace(**{field: bad})))


MOVES = [("kept", "dropped"), ("dropped", "kept"), ("kept", "not_sampled"), ("dropped", "spilled")]


@pytest.mark.parametrize(("source", "target"), MOVES)
def test_an_assignment_entered_under_another_outcome_shows(source: str, target: str) -> None:
    """The sum of outcomes stays; the rows that experts really got give it away."""
    record = topk_record(asking([(0, 1)] * 4, 3), 2)
    book = ledger(record, record, plan_capacity(record, 4, 2))
    outcome_EKO = book.outcome_EKO.clone()
    outcome_EKO[0, 0, OUTCOMES.index(source)] -= 1
    outcome_EKO[0, 0, OUTCOMES.index(target)] += 1
    assert bool(is_conserved(book))
    assert not bool(is_conserved(book._replace(outcome_EKO=outcome_EKO)))


def test_rows_without_slots_show() -> None:
    record = topk_record(asking([(0,), (1,)], 2), 1)
    book = ledger(record, record, plan_capacity(record, 2, 1))
    assert not bool(is_conserved(book._replace(slots=torch.tensor(1))))


def test_a_row_at_another_expert_shows() -> None:
    """Expert 0 kept one assignment, so it cannot have computed none, whatever expert 1 did."""
    record = topk_record(asking([(0,), (1,)], 2), 1)
    book = ledger(record, record, plan_capacity(record, 2, 1))
    assert not bool(is_conserved(book._replace(row_E=torch.tensor([0, 2]))))


@MANY
@given(one=cases(policy="spill"), other=st.integers(0, 999))
def test_sums_of_conserved_ledgers_are_conserved(one: Case, other: int) -> None:
    books = [book_of(one)]
    generator = torch.Generator().manual_seed(other)
    logits_TE = torch.randn(one.tokens, one.experts, generator=generator, dtype=torch.float64)
    record = topk_record(logits_TE, min(one.columns, one.experts), one.valid)
    books.append(ledger(record, record, plan_capacity(record, one.group_size, 1)))
    total = Ledger(*(sum(counts[1:], counts[0]) for counts in zip(*books, strict=True)))
    assert bool(is_conserved(total))


# ---- tables --------------------------------------------------------------------------------------


def test_a_spilled_assignment_is_booked_with_its_choice_and_its_row_elsewhere() -> None:
    """Both tokens ask for expert 0, which has one slot; token 1 goes on to expert 1. By the expert
    chosen, 0 has one kept and one spilled; by rows, 0 and 1 have one each."""
    record = topk_record(asking([(0,), (0,)], 2), 1)
    settled = spill(record, group_size=2, slots=1, depth=1)
    book = Settled(record, settled, plan_capacity(settled, 2, 1)).ledger
    assert book.outcome_EKO[:, 0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert book.row_E.tolist() == [1, 1]
    assert (book.assigned, book.tokens, book.lost_tokens) == (2, 2, 0)


def test_gate_mass_leaves_out_padding_and_what_was_not_sampled() -> None:
    """Gates .75 and .25, one slot. Token 0 is kept whole (1.0); token 1's second choice is not
    sampled, so it asks for .75 and loses it; token 2 is padding: .75 of 1.75 is lost."""
    logits_TE = torch.tensor([[0.75, 0.25]] * 3, dtype=torch.float64).log()
    record = topk_record(logits_TE, 2, [True, True, False])
    sampled_TK = torch.tensor([[True, True], [True, False], [True, True]])
    record = record._replace(sampled_TK=sampled_TK)
    mass = gate_mass(record, plan_capacity(record, 3, 1))
    torch.testing.assert_close(torch.stack(mass).tolist(), [1.75, 0.75])
