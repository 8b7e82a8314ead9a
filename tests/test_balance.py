from __future__ import annotations

import itertools
import math

import oracle_losses
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_gates import scalar
from strategies import GATES, MANY, Case, asking, cases, close, gradients, topk_record
from torch import Tensor

from moetrain.moe import Gate, Routing, routing
from moetrain.moe.balance import Demand, balance, demand, join, mass_gradient, z_loss
from moetrain.moe.capacity import plan_capacity
from moetrain.moe.ledger import ledger

TOPK = Gate("topk", 1)
GSHARD = Gate("gshard", 2)


def loss_of(gate: Gate, record: Routing, group_size: int) -> Tensor:
    """Summed over routing groups."""
    return balance(gate, demand(gate, record, group_size)).sum()


def switch_balance(record: Routing, group_size: int) -> Tensor:
    return loss_of(TOPK, record, group_size)


def every(tokens: int) -> Tensor:
    return torch.ones(tokens, dtype=torch.bool)


def sharp(choices: list[tuple[int, ...]], experts: int) -> Tensor:
    """Logits so far apart that nearly all probability is on the first choice."""
    return 40 * asking(choices, experts)


def logs(*rows: list[float]) -> Tensor:
    """Logits whose softmax is the rows given."""
    return torch.tensor(rows, dtype=torch.float64).log()


# ---- against the oracle: each group, and the whole batch -----------------------------------------


def assert_same_gradients(ours: Tensor, theirs: Tensor, leaves: dict[str, Tensor]) -> None:
    every_leaf = list(leaves.values())
    pairs = zip(gradients(ours, every_leaf), gradients(theirs, every_leaf), strict=True)
    for mine, judged in pairs:
        close(mine, judged)


@pytest.mark.parametrize("kind", GATES)
def test_losses_and_their_gradients_agree_with_the_oracle(kind: str) -> None:
    @settings(MANY, max_examples=20)
    @given(case=cases(kind))
    def agree(case: Case) -> None:
        leaves = case.leaves()
        record, answer = case.route(leaves), case.answer(leaves)
        loss = loss_of(case.gate, record, case.group_size)
        for ours, theirs in [(loss, answer.balance), (z_loss(record), answer.z)]:
            close(ours, theirs)
            assert_same_gradients(ours, theirs, leaves)

    agree()


def cut(whole: Demand, edges: list[int]) -> list[Demand]:
    """Joined demands of the stretches of tokens between the edges."""
    stretches = itertools.pairwise(edges)
    return [join(Demand(*(part[start:stop] for part in whole))) for start, stop in stretches]


@pytest.mark.parametrize("kind", GATES)
def test_a_batch_cut_anywhere_has_the_loss_and_gradient_of_the_whole(kind: str) -> None:
    """Σ gradient·mass of the parts, as micro-batches and ranks add it up, against the oracle's loss
    on all tokens as one set. The parts respect no routing group, and some are empty."""

    @settings(MANY, max_examples=20)
    @given(case=cases(kind), cuts=st.lists(st.integers(0, 21), max_size=4))
    def agree(case: Case, cuts: list[int]) -> None:
        leaves = case.leaves()
        record = case.route(leaves)
        edges = [0, *sorted(min(c, case.tokens) for c in cuts), case.tokens]
        parts = cut(demand(case.gate, record, group_size=1), edges)
        columns = zip(*(Demand(*(p.detach() for p in part)) for part in parts), strict=True)
        total = join(Demand(*(torch.cat(column) for column in columns)))
        loss_G, gradient_GME = mass_gradient(case.gate, total)
        assert not loss_G.requires_grad
        tokens = [token for token in case.answer(leaves).tokens if token is not None]
        expected = oracle_losses.balance(case.router, tokens)
        close(loss_G, expected[None])
        ours = sum(((gradient_GME * part.mass_GME).sum() for part in parts), scalar(0.0))
        assert_same_gradients(ours, expected, leaves)

    agree()


@MANY
@given(case=cases())
def test_counts_are_integers_and_counted_before_drops(case: Case) -> None:
    whole = case.settle(case.route(case.leaves()))
    asked = demand(case.gate, whole.record, case.group_size)
    assert asked.count_GE.dtype == asked.tokens_G.dtype == torch.int64
    outcome_EKO = whole.ledger.outcome_EKO
    counted_EKO = outcome_EKO[:, :1] if case.router.kind == "gshard" else outcome_EKO
    assert torch.equal(asked.count_GE.sum(0), counted_EKO.sum((1, 2)))
    assert asked.tokens_G.sum() == whole.ledger.tokens


# ---- scale: 1 at perfect balance -----------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("experts", [4, 8])
def test_perfect_balance_is_one_for_every_k(experts: int, k: int) -> None:
    """Token t asks for experts t, t+1, ...: every expert is asked k times."""
    turns = [tuple((t + j) % experts for j in range(k)) for t in range(experts)]
    close(switch_balance(topk_record(asking(turns, experts), k), experts), 1.0)


def test_perfect_balance_is_one_for_gshard() -> None:
    turns = [(t, (t + 1) % 5) for t in range(5)]
    close(loss_of(GSHARD, routing.gshard(asking(turns, 5), every(5), None), 5), 1.0)


def test_collapse_is_the_number_of_experts() -> None:
    record = topk_record(sharp([(2,)] * 6, 4), 1)
    close(switch_balance(record, 6), 4.0)


def test_worked_values() -> None:
    """Two experts, three tokens with probabilities (.8 .2), (.6 .4), (.1 .9).

    Mean probabilities .5, .5 and K = 1: f = (2/3, 1/3), so 2·(2/3·.5 + 1/3·.5) = 1. Leaving the
    last token out as padding: f = (1, 0), P = (.7, .3), so 2·.7 = 1.4.
    """
    logits_TE = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]], dtype=torch.float64).log()
    close(switch_balance(topk_record(logits_TE, 1), 3), 1.0)
    padded = topk_record(logits_TE, 1, [True, True, False])
    close(switch_balance(padded, 3), 1.4)


def test_gshard_counts_first_choices_only() -> None:
    """Expert 0 is everybody's first and 1 everybody's second choice. GShard sees a collapse of
    first choices: 3·P_0. Counting both choices would give 3·(P_0 + P_1)/2."""
    logits_TE = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log().repeat(4, 1)
    record = routing.gshard(logits_TE, every(4), None)
    close(loss_of(GSHARD, record, 4), 1.8)
    close(switch_balance(record, 4), 1.35)


# ---- what the counts are of ----------------------------------------------------------------------


def test_balance_sees_what_was_asked_before_any_drop() -> None:
    """With C = 1 every expert ends up with exactly one token; the loss still sees 5 to 1 to 0.

    One token more is what a loss on kept tokens could not see: it would stay at 1 forever.
    """
    choices = [(0,), (0,), (1,), (0,), (0,), (0,), (2,), (0,)]
    record = topk_record(sharp(choices, 3), 1)
    after = ledger(record, record, plan_capacity(record, 8, slots=1)).outcome_EKO[:, 0, 0]
    assert after.tolist() == [1, 1, 1]
    f = torch.tensor([6, 1, 1], dtype=torch.float64) / 8
    close(switch_balance(record, 8), 3 * (f * f).sum())


def test_a_second_choice_that_is_not_sampled_still_counts_nowhere_in_gshard() -> None:
    """Sampling concerns second choices, the loss first ones: it cannot move it."""
    logits_TE = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    never, always = (routing.gshard(logits_TE, every(8), u) for u in (torch.ones(8), None))
    assert not never.sampled_TK[:, 1].all()
    assert torch.equal(loss_of(GSHARD, never, 8), loss_of(GSHARD, always, 8))


def test_each_group_is_judged_alone() -> None:
    """Group 1 asks only for expert 0, group 2 only for expert 1: each has collapsed and scores 2.
    Judged together they would look perfect, and score 1."""
    record = topk_record(sharp([(0,), (0,), (1,), (1,)], 2), 1)
    close(switch_balance(record, 2), 4.0)
    close(switch_balance(record, 4), 1.0)


def test_each_layer_is_judged_alone() -> None:
    """Two layers collapsed on different experts score 2 each, mean 2. Concatenating what their
    routers said would again look perfect."""
    first, second = (sharp([(e,)] * 4, 2) for e in (0, 1))
    layers = [switch_balance(topk_record(logits_TE, 1), 4) for logits_TE in (first, second)]
    close(torch.stack(layers).mean(), 2.0)
    together = topk_record(torch.cat([first, second]), 1)
    close(switch_balance(together, 8), 1.0)


def test_a_group_without_valid_tokens_adds_nothing() -> None:
    record = topk_record(sharp([(0,), (1,), (0,), (0,)], 2), 1, [True, True, False, False])
    close(switch_balance(record, 2), 1.0)
    nobody = topk_record(torch.zeros(4, 2, dtype=torch.float64), 1, [False] * 4)
    assert switch_balance(nobody, 2) == 0
    assert z_loss(nobody) == 0


@MANY
@given(case=cases())
def test_losses_of_groups_add_up_to_the_loss_of_all(case: Case) -> None:
    """So that no cut of a batch into micro-batches or ranks changes the objective."""
    record = case.route(case.leaves())
    parts = [
        Routing(*(None if p is None else p[start : start + case.group_size] for p in record))
        for start in range(0, case.tokens, case.group_size)
    ]
    for loss in (lambda r: loss_of(case.gate, r, case.group_size), z_loss):
        close(loss(record), torch.stack([loss(part) for part in parts]).sum())


# ---- noisy top-k, two levels ---------------------------------------------------------------------


def test_variation_of_importance_and_load() -> None:
    """Two experts, K = 1, three tokens of which two go to expert 0: importance (2, 1) has mean 1.5
    and variance .25, so CV² = 1/9. Load (.7, 1.3): mean 1, variance .09. 1 + 1/9 + .09."""
    record = routing.noisy_topk(*[asking([(0,), (1,), (0,)], 2)] * 2, every(3), 1, None)
    load_TE = torch.tensor([[0.2, 0.5], [0.2, 0.4], [0.3, 0.4]], dtype=torch.float64)
    loss = loss_of(Gate("noisy_topk", 1), record._replace(load_TE=load_TE), 3)
    close(loss, 1 + 1 / 9 + 0.09)


def test_noisy_routing_starts_balanced() -> None:
    """Weights start at 0: with noise the gates vary, without it every load is alike, and one
    expert takes everything: importance (3, 0, 0) has CV² = 2."""
    zero_TE = torch.zeros(3, 3, dtype=torch.float64)
    record = routing.noisy_topk(zero_TE, zero_TE, every(3), 1, None)
    assert record.load_TE is not None
    close(record.load_TE, torch.full((3, 3), 0.5, dtype=torch.float64))
    close(loss_of(Gate("noisy_topk", 1), record, 3), 3.0)


TWO_LEVELS = Gate("hierarchical", 1, groups=2)


def two_levels(outer_TA: Tensor, inner_TE: Tensor) -> Tensor:
    tokens = len(outer_TA)
    record = routing.hierarchical(outer_TA, inner_TE, every(tokens), 1, 1, renormalize=False)
    return loss_of(TWO_LEVELS, record, tokens)


def test_two_levels_see_a_collapse_at_either() -> None:
    """Two groups of two experts, four tokens. All at one expert: both levels score 2. Groups even,
    one expert in each: (1 + 2)/2. One group, its experts even: (2 + 1)/2; the group that nobody
    chose is left out. All even: 1."""
    left, right = [40.0, 0.0], [0.0, 40.0]
    outers = {"even": [left, left, right, right], "one": [left] * 4}
    inners = {"even": [left * 2, right * 2] * 2, "one": [left * 2] * 4}
    expected = {("one", "one"): 2, ("even", "one"): 1.5, ("one", "even"): 1.5, ("even", "even"): 1}
    for (outer, inner), loss in expected.items():
        rows = outers[outer], inners[inner]
        close(two_levels(*(torch.tensor(r, dtype=torch.float64) for r in rows)), float(loss))


def test_two_levels_by_hand() -> None:
    """Tokens 0 and 1 choose group 0 (.8, .6) and there experts 0 (.9) and 1 (.7); token 2 chooses
    group 1 (.7) and expert 3 (.6). Outer: f = (2/3, 1/3), P = (1.7/3, 1.3/3), 2·Σ = 94/90.
    Inside group 0, of tokens 0 and 1: f = (1/2, 1/2), so 1. Inside group 1, of token 2: 2·.6."""
    outer = logs([0.8, 0.2], [0.6, 0.4], [0.3, 0.7])
    inner = logs([0.9, 0.1, 0.5, 0.5], [0.3, 0.7, 0.5, 0.5], [0.5, 0.5, 0.4, 0.6])
    close(two_levels(outer, inner), (94 / 90 + (1 + 1.2) / 2) / 2)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_perfect_balance_is_one_for_every_gate(k: int) -> None:
    """Every expert is asked equally often, with logits that are each other's rotations."""
    turns = [tuple((t + j) % 4 for j in range(k)) for t in range(4)]
    logits_TE, zero_E = asking(turns, 4), torch.zeros(4, dtype=torch.float64)
    records = {
        "topk": routing.topk(logits_TE, every(4), k, renormalize=False),
        "noisy_topk": routing.noisy_topk(logits_TE, logits_TE, every(4), k, None),
        "sigmoid": routing.sigmoid(logits_TE, zero_E, every(4), k),
        "expert_choice": routing.expert_choice(logits_TE, every(4), 4, k),
        "balanced": routing.ranked(routing.round_robin(torch.arange(4), 4, 1), every(4), k),
        "dense": routing.dense(logits_TE, every(4)),
    }
    for name, record in records.items():
        close(loss_of(Gate(name, k), record, 4).double(), 1.0)  # type: ignore[arg-type]


def test_a_balanced_batch_may_hold_groups_that_have_collapsed() -> None:
    """Two groups that use one expert each score 2 apiece; joined they are perfect, and the gradient
    of the whole batch asks for no change."""
    record = topk_record(sharp([(0,), (0,), (1,), (1,)], 2).requires_grad_(), 1)
    apart = demand(TOPK, record, 2)
    close(balance(TOPK, apart), torch.tensor([2.0, 2.0], dtype=torch.float64))
    loss_G, gradient_GME = mass_gradient(TOPK, join(apart))
    close(loss_G, torch.ones(1, dtype=torch.float64))
    close(gradient_GME, torch.full((1, 1, 2), 1 / 4, dtype=torch.float64))


def test_the_gradient_of_an_empty_batch_is_zero() -> None:
    for kind, experts in [("topk", 4), ("noisy_topk", 4), ("hierarchical", 4), ("gshard", 4)]:
        masses = 2 if kind in ("noisy_topk", "hierarchical") else 1
        nothing = Demand(
            torch.zeros(1, experts, dtype=torch.int64),
            torch.zeros(1, masses, experts),
            torch.zeros(1, dtype=torch.int64),
        )
        loss_G, gradient_GME = mass_gradient(Gate(kind, 2, groups=2), nothing)  # type: ignore[arg-type]
        assert loss_G.tolist() == [0]
        assert (gradient_GME == 0).all()


# ---- z-loss --------------------------------------------------------------------------------------


def test_z_loss_is_the_squared_logsumexp_of_valid_tokens() -> None:
    """Logits (log 1, log 2, log 3) have logsumexp log 6; the second token is padding."""
    logits_TE = torch.tensor([[1.0, 2.0, 3.0], [9.0, 9.0, 9.0]], dtype=torch.float64).log()
    record = topk_record(logits_TE, 1, [True, False])
    close(z_loss(record), math.log(6) ** 2)


def test_z_loss_survives_large_logits() -> None:
    assert z_loss(topk_record(torch.full((1, 4), 1e4), 1)).isfinite()
