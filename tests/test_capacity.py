from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from strategies import GATES, MANY, POLICIES, Case, Settled, asking, cases, topk_record

from moetrain.moe import OUTCOMES, Plan, Routing, capacity, routing
from moetrain.moe.capacity import plan_capacity, plan_dropless
from moetrain.moe.ledger import ledger

# ---- capacity(): the number of slots -------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor", "least", "slots"),
    [
        (64, 8, 2, 1.0, 1, 16),
        (64, 8, 2, 1.25, 1, 20),
        (7, 8, 1, 1.0, 1, 1),
        (10, 3, 1, 1.0, 1, 4),
        (64, 8, 2, 0.1, 1, 2),
        (6, 3, 1, 1.5, 1, 3),
        (4, 3, 2, 1.0, 1, 3),
        # The factor is the decimal that was written. Its binary value times 10 is above 11, and
        # float products are above 110 and above 7: each would round up to one slot more.
        (20, 2, 1, 1.1, 1, 11),
        (200, 2, 1, 1.1, 1, 110),
        (200, 2, 1, 0.07, 1, 7),
        # The least capacity, and a group smaller than it.
        (64, 64, 1, 1.0, 4, 4),
        (64, 8, 2, 1.0, 4, 16),
        (3, 8, 1, 1.0, 4, 3),
        (1, 8, 8, 1e-7, 1, 1),
        # No expert is asked by a token twice, so C never exceeds S: K·factor > E, K = E.
        (16, 4, 4, 9.0, 1, 16),
        (16, 4, 4, 1.0, 1, 16),
        (10, 1, 1, 1.1, 1, 10),
        (10, 2, 1, 1e9, 1, 10),
        (12, 4, 2, 2, 1, 12),
    ],
)
def test_capacity_table(
    tokens: int, experts: int, k: int, factor: float, least: int, slots: int
) -> None:
    assert capacity(tokens, experts, k, factor, least) == slots
    assert oracle.capacity(tokens, experts, k, factor, least) == slots


@pytest.mark.parametrize("factor", [0.0, -1.25, float("nan"), float("inf"), -float("inf")])
def test_a_senseless_factor_is_refused_by_name(factor: float) -> None:
    with pytest.raises(ValueError, match="capacity factor") as caught:
        capacity(96, 12, 3, factor, 1)
    for given_value in (str(factor), "96", "12", "3"):
        assert given_value in str(caught.value)


# ---- tables: who loses, and why ------------------------------------------------------------------


def record_of(
    choices: list[tuple[int, ...]], experts: int, valid: list[bool] | None = None
) -> Routing:
    """Tokens that ask for the experts listed, in that order."""
    return topk_record(asking(choices, experts), len(choices[0]), valid)


def kept(record: Routing, plan: Plan) -> list[list[bool]]:
    rows = plan.source_R.numel()
    return (plan.row_TK < rows).tolist()


def outcomes(record: Routing, plan: Plan) -> dict[str, int]:
    totals = ledger(record, record, plan).outcome_EKO.sum((0, 1)).tolist()
    return {name: n for name, n in zip(OUTCOMES, totals, strict=True) if n}


Y, N = True, False


def test_three_devices_balanced_drop_nothing() -> None:
    """6 tokens, one expert on each of 3 devices, capacity 3: two tokens each, one slot to spare."""
    record = record_of([(0,), (1,), (2,), (0,), (1,), (2,)], experts=3)
    plan = plan_capacity(record, group_size=6, slots=capacity(6, 3, 1, 1.5, 1))
    assert outcomes(record, plan) == {"kept": 6}
    assert ledger(record, record, plan).slots == 9


def test_three_devices_with_five_of_six_tokens_at_one_drop_two() -> None:
    """Expert 0 has 3 slots for tokens 0, 1, 3, 4, 5: the last two in token order lose."""
    record = record_of([(0,), (0,), (2,), (0,), (0,), (0,)], experts=3)
    plan = plan_capacity(record, group_size=6, slots=capacity(6, 3, 1, 1.5, 1))
    assert kept(record, plan) == [[Y], [Y], [Y], [Y], [N], [N]]
    assert outcomes(record, plan) == {"kept": 4, "dropped": 2}
    assert ledger(record, record, plan).lost_tokens == 2


def test_two_choices_of_four_tokens_fit_nine_slots_when_spread() -> None:
    """8 assignments for 3 devices of 3 slots: loads of 3, 3 and 2 fit."""
    record = record_of([(0, 1), (1, 2), (2, 0), (0, 1)], experts=3)
    plan = plan_capacity(record, group_size=4, slots=capacity(4, 3, 2, 1.0, 1))
    assert outcomes(record, plan) == {"kept": 8}


def test_two_choices_of_four_tokens_do_not_fit_nine_slots_when_bunched() -> None:
    """Nobody wants expert 2, so 3 slots stay empty while 2 assignments are dropped: experts 0 and 1
    each have four tokens for three slots. First choices go in first, so of the second choices,
    in token order, token 2 (at expert 1) and token 3 (at expert 0) find no room."""
    record = record_of([(0, 1), (1, 0), (0, 1), (1, 0)], experts=3)
    plan = plan_capacity(record, group_size=4, slots=capacity(4, 3, 2, 1.0, 1))
    assert kept(record, plan) == [[Y, Y], [Y, Y], [Y, N], [Y, N]]
    assert outcomes(record, plan) == {"kept": 6, "dropped": 2}
    assert ledger(record, record, plan).lost_tokens == 0


def test_every_first_choice_goes_before_any_second() -> None:
    """One slot each. Token 0 comes before token 1, yet its second choice loses expert 1 to token
    1's first choice. Token 2 loses both: expert 0 to token 0, expert 1 to token 1."""
    record = record_of([(0, 1), (1, 0), (0, 1)], experts=2)
    plan = plan_capacity(record, group_size=3, slots=1)
    assert kept(record, plan) == [[Y, N], [Y, N], [N, N]]
    assert ledger(record, record, plan).lost_tokens == 1


def test_capacity_counts_all_choices_of_an_expert_together() -> None:
    """Four tokens ask both experts, C = 2: an expert keeps 2 assignments, not 2 per choice."""
    record = record_of([(0, 1), (1, 0), (0, 1), (1, 0)], experts=2)
    plan = plan_capacity(record, group_size=4, slots=capacity(4, 2, 2, 0.5, 1))
    assert plan.count_E.tolist() == [2, 2]
    assert outcomes(record, plan) == {"kept": 4, "dropped": 4}


def test_a_second_choice_that_is_not_sampled_takes_no_slot() -> None:
    """One slot each. Token 0 does not sample expert 2, so token 1's second choice gets it."""
    record = record_of([(0, 2), (1, 2), (0, 2)], experts=3)
    record = record._replace(sampled_TK=torch.tensor([[Y, N], [Y, Y], [Y, Y]]))
    plan = plan_capacity(record, group_size=3, slots=1)
    assert kept(record, plan) == [[Y, N], [Y, Y], [N, N]]
    assert outcomes(record, plan) == {"kept": 3, "dropped": 2, "not_sampled": 1}
    assert ledger(record, record, plan).outcome_EKO[2, 1].tolist() == [1, 0, 1, 1]


def test_padding_takes_no_slot() -> None:
    """One slot each. Token 0 is padding, so token 1 is the first that asks for expert 0."""
    record = record_of([(0,), (0,), (1,), (0,)], experts=2, valid=[N, Y, N, Y])
    plan = plan_capacity(record, group_size=4, slots=1)
    assert kept(record, plan) == [[N], [Y], [N], [N]]
    book = ledger(record, record, plan)
    assert book.outcome_EKO[:, 0].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert (book.tokens, book.lost_tokens) == (2, 1)


def test_groups_do_not_share_slots() -> None:
    """Two groups of two tokens, one slot each: the first token of *each* group keeps its place."""
    record = record_of([(0,), (0,), (0,), (0,)], experts=2)
    plan = plan_capacity(record, group_size=2, slots=1)
    assert kept(record, plan) == [[Y], [N], [Y], [N]]


def test_position_means_position() -> None:
    """1,000 tokens tie in everything; the first 10 keep their slots."""
    record = record_of([(1, 0)] * 1000, experts=3)
    plan = plan_capacity(record, group_size=1000, slots=10)
    assert kept(record, plan) == [[Y, Y]] * 10 + [[N, N]] * 990


def test_all_tokens_at_one_expert_are_counted_exactly() -> None:
    record = record_of([(3,)] * 500, experts=5)
    plan = plan_capacity(record, group_size=100, slots=capacity(100, 5, 1, 1.25, 1))
    book = ledger(record, record, plan)
    assert book.outcome_EKO[3].tolist() == [[125, 0, 375, 0]]
    assert book.outcome_EKO.sum() == 500
    assert (book.tokens, book.lost_tokens, book.slots) == (500, 375, 625)


# ---- who goes first: priorities ------------------------------------------------------------------


def test_the_highest_gate_is_served_first() -> None:
    """One expert with two slots; gates .6, .9, .7, .9: tokens 1 and 3, in that order, keep them."""
    record = record_of([(0,)] * 4, experts=2)
    priority_TK = torch.tensor([[0.6], [0.9], [0.7], [0.9]])
    plan = plan_capacity(record, 4, 2, priority_TK)
    assert kept(record, plan) == [[N], [Y], [N], [Y]]
    assert plan.row_TK.flatten().tolist() == [4, 0, 4, 1]


def test_a_strong_second_choice_goes_before_a_weak_first() -> None:
    """Probability alone counts: token 0's second choice (.45) takes expert 1's only slot from token
    1's first choice (.4). By position it would be the other way round."""
    record = record_of([(0, 1), (1, 2)], experts=3)
    priority_TK = torch.tensor([[0.55, 0.45], [0.4, 0.35]])
    assert kept(record, plan_capacity(record, 2, 1, priority_TK)) == [[Y, Y], [N, Y]]
    assert kept(record, plan_capacity(record, 2, 1)) == [[Y, N], [Y, Y]]


def test_equal_priorities_are_served_by_choice_then_token() -> None:
    """All equal: first choices before second ones, earlier tokens before later ones."""
    record = record_of([(1, 0), (0, 1), (0, 1)], experts=2)
    by_priority = plan_capacity(record, 3, 2, torch.full((3, 2), 0.5))
    assert kept(record, by_priority) == [[Y, N], [Y, Y], [Y, N]]
    assert torch.equal(by_priority.row_TK, plan_capacity(record, 3, 2).row_TK)


def test_priorities_do_not_cross_groups() -> None:
    """The best of each group keeps the slot, however good the losers of the other are."""
    record = record_of([(0,)] * 4, experts=1)
    plan = plan_capacity(record, 2, 1, torch.tensor([[0.9], [0.8], [0.1], [0.2]]))
    assert kept(record, plan) == [[Y], [N], [N], [Y]]


def test_padding_with_the_highest_priority_takes_no_slot() -> None:
    record = record_of([(0,)] * 3, experts=1, valid=[N, Y, Y])
    plan = plan_capacity(record, 3, 1, torch.tensor([[9.0], [0.1], [0.2]]))
    assert kept(record, plan) == [[N], [N], [Y]]


def test_priorities_that_are_not_numbers_crash_nothing() -> None:
    record = record_of([(0,)] * 3, experts=1)
    plan = plan_capacity(record, 3, 2, torch.tensor([[0.1], [torch.nan], [0.2]]))
    assert plan.count_E.tolist() == [2]


# ---- against the oracle --------------------------------------------------------------------------


def check_rows_and_sources(plan: Plan) -> None:
    """`row_TK` and `source_R` are each other's inverse, and whatever is left over says so."""
    rows, assignments = plan.source_R.numel(), plan.row_TK.numel()
    row_N = plan.row_TK.flatten().tolist()
    source_R = plan.source_R.tolist()
    for assignment, row in enumerate(row_N):
        assert row == rows or source_R[row] == assignment
    for row, assignment in enumerate(source_R):
        assert assignment == assignments or row_N[assignment] == row


def check_verdicts(case: Case, plan: Plan, answer: oracle.Answer, slots: int) -> None:
    """Who has a row: at which expert, in which group, and, but for spilling, in which slot."""
    rows = case.experts * case.groups * slots
    for t, verdicts in enumerate(answer.verdicts):
        row_K = plan.row_TK[t].tolist()
        told = verdicts or []
        assert row_K[len(told) :] == [rows] * (case.columns - len(told))
        for row, verdict in zip(row_K, told, strict=False):
            if verdict.expert is None:
                assert row == rows
                continue
            queue, slot = divmod(row, slots)
            assert queue == verdict.expert * case.groups + t // case.group_size
            assert slot == verdict.slot or case.policy == "spill"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", GATES)
def test_slots_agree_with_the_oracle(kind: str, policy: str) -> None:
    @settings(MANY, max_examples=6)
    @given(case=cases(kind, dropless=False, policy=policy))
    def agree(case: Case) -> None:
        leaves = case.leaves()
        answer = case.answer(leaves)
        plan, slots = case.settle(case.route(leaves)).plan, case.slots
        assert slots is not None
        shape = (case.group_size, case.experts, case.router.k)
        assert slots == capacity(*shape, case.factor or 0, case.min_capacity)
        assert plan.rows_per_expert == case.groups * slots
        check_verdicts(case, plan, answer, slots)
        assert plan.count_E.tolist() == [answer.ledger.rows[e] for e in range(case.experts)]
        check_rows_and_sources(plan)

    agree()


@MANY
@given(case=cases(dropless=True).filter(lambda case: case.factor is None))
def test_dropless_rows_are_sorted_by_expert(case: Case) -> None:
    record, _, plan = case.settle(case.route(case.leaves()))
    assert plan.rows_per_expert is None
    asks_TK = record.sampled_TK & record.valid_T[:, None]
    expert_of_row = plan.row_TK.new_full((plan.source_R.numel() + 1,), case.experts)
    expert_of_row[plan.row_TK[asks_TK]] = record.expert_TK[asks_TK]
    experts = expert_of_row[:-1].tolist()
    assert experts == sorted(experts), "rows are sorted by expert, the empty ones last"
    assert plan.count_E.tolist() == [experts.count(e) for e in range(case.experts)]
    assert (plan.row_TK[~asks_TK] == plan.source_R.numel()).all()
    check_rows_and_sources(plan)


def part_of(case: Case, whole: Settled, start: int, stop: int) -> Settled:
    """The same tokens alone."""
    record, settled = (
        Routing(*(None if part is None else part[start:stop] for part in routing))
        for routing in whole[:2]
    )
    if case.slots is None:
        return Settled(record, settled, plan_dropless(settled))
    priority_TK = (
        routing.comparable(record.gate_TK) if case.policy == "probability" else case.priority()
    )
    if case.policy == "random" and priority_TK is not None:
        priority_TK = priority_TK[start:stop]
    return Settled(
        record, settled, plan_capacity(settled, case.group_size, case.slots, priority_TK)
    )


@MANY
@given(case=cases())
def test_groups_are_planned_apart(case: Case) -> None:
    """Their ledgers add up to the ledger of all, and each alone fills the slots it fills there."""
    whole = case.settle(case.route(case.leaves()))
    parts = [
        part_of(case, whole, start, start + case.group_size)
        for start in range(0, case.tokens, case.group_size)
    ]
    columns = zip(*(part.ledger for part in parts), strict=True)
    for count, counts in zip(whole.ledger, columns, strict=True):
        assert torch.equal(count, torch.stack(counts).sum(0))
    has_row = [part.plan.row_TK < part.plan.source_R.numel() for part in parts]
    assert torch.equal(torch.cat(has_row), whole.plan.row_TK < whole.plan.source_R.numel())


@MANY
@given(case=cases(dropless=False, policy="position"))
def test_padding_at_the_end_changes_nobodys_fate(case: Case) -> None:
    """The same group with more padding behind it, at the same C, keeps the same tokens."""
    group = part_of(case, case.settle(case.route(case.leaves())), 0, case.group_size).record
    longer = Routing(*(None if part is None else torch.cat([part, part]) for part in group))
    padding = torch.zeros(case.group_size, dtype=torch.bool)
    longer = longer._replace(valid_T=torch.cat([group.valid_T, padding]))
    slots = case.slots or 0
    short_plan = plan_capacity(group, case.group_size, slots)
    long_plan = plan_capacity(longer, 2 * case.group_size, slots)
    assert torch.equal(long_plan.row_TK[: case.group_size], short_plan.row_TK)
    books = ledger(group, group, short_plan), ledger(longer, longer, long_plan)
    for one, other in zip(*books, strict=True):
        assert torch.equal(one, other)


def test_dropless_provides_the_slots_that_it_fills() -> None:
    record = record_of([(0, 1), (0, 1), (0, 1)], experts=4, valid=[Y, N, Y])
    plan = plan_dropless(record)
    assert ledger(record, record, plan).slots == 4
    assert plan.count_E.tolist() == [2, 2, 0, 0]
