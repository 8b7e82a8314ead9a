from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given
from strategies import KINDS, MANY, Case, asking, cases, close, gradients, route
from torch import Tensor

from moetrain.moe import Routing
from moetrain.moe.balance import gshard_balance, switch_balance, z_loss
from moetrain.moe.capacity import ledger, plan_capacity


def balance_sum(case: Case, record: Routing) -> Tensor:
    if case.router.kind == "gshard":
        return gshard_balance(record, case.group_size)
    return switch_balance(record, case.group_size)


def topk_record(logits_TE: Tensor, k: int, valid: list[bool] | None = None) -> Routing:
    valid_T = torch.tensor(valid or [True] * len(logits_TE))
    return route(oracle.Router("topk", k), logits_TE, valid_T)


def sharp(choices: list[tuple[int, ...]], experts: int) -> Tensor:
    """Logits so far apart that nearly all probability is on the first choice."""
    return 40 * asking(choices, experts)


# ---- against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_their_gradients_agree_with_the_oracle(kind: str) -> None:
    @MANY
    @given(case=cases(kind))
    def agree(case: Case) -> None:
        logits_TE = case.logits()
        record, answer = case.route(logits_TE), case.answer(logits_TE)
        pairs = [(balance_sum(case, record), answer.balance), (z_loss(record), answer.z)]
        for ours, theirs in pairs:
            close(ours, theirs)
            close(gradients(ours, [logits_TE])[0], gradients(theirs, [logits_TE])[0])

    agree()


# ---- scale: 1 at perfect balance -----------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("experts", [4, 8])
def test_perfect_balance_is_one_for_every_k(experts: int, k: int) -> None:
    """Token t asks for experts t, t+1, ...: every expert is asked k times."""
    turns = [tuple((t + j) % experts for j in range(k)) for t in range(experts)]
    close(switch_balance(topk_record(asking(turns, experts), k), experts), 1.0)


def test_perfect_balance_is_one_for_gshard() -> None:
    turns = [(t, (t + 1) % 5) for t in range(5)]
    record = route(oracle.Router("gshard", 2), asking(turns, 5), torch.ones(5, dtype=torch.bool))
    close(gshard_balance(record, 5), 1.0)


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
    record = route(oracle.Router("gshard", 2), logits_TE, torch.ones(4, dtype=torch.bool))
    close(gshard_balance(record, 4), 1.8)
    close(switch_balance(record, 4), 1.35)


# ---- what the counts are of ----------------------------------------------------------------------


def test_balance_sees_what_was_asked_before_any_drop() -> None:
    """With C = 1 every expert ends up with exactly one token; the loss still sees 5 to 1 to 0.

    One token more is what a loss on kept tokens could not see: it would stay at 1 forever.
    """
    choices = [(0,), (0,), (1,), (0,), (0,), (0,), (2,), (0,)]
    record = topk_record(sharp(choices, 3), 1)
    after = ledger(record, plan_capacity(record, 8, slots=1)).outcome_EKO[:, 0, 0]
    assert after.tolist() == [1, 1, 1]
    f = torch.tensor([6, 1, 1], dtype=torch.float64) / 8
    close(switch_balance(record, 8), 3 * (f * f).sum())


def test_a_second_choice_that_is_not_sampled_still_counts_nowhere_in_gshard() -> None:
    """Sampling concerns second choices, the loss first ones: it cannot move it."""
    logits_TE = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    every = torch.ones(8, dtype=torch.bool)
    router = oracle.Router("gshard", 2)
    never = route(router, logits_TE, every, torch.ones(8))
    assert not never.sampled_TK[:, 1].all()
    assert torch.equal(gshard_balance(never, 8), gshard_balance(route(router, logits_TE, every), 8))


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
    record = case.route(case.logits().detach())
    parts = [
        Routing(*(part[start : start + case.group_size] for part in record))
        for start in range(0, case.tokens, case.group_size)
    ]
    for loss in (lambda r: balance_sum(case, r), z_loss):
        close(loss(record), torch.stack([loss(part) for part in parts]).sum())


# ---- z-loss --------------------------------------------------------------------------------------


def test_z_loss_is_the_squared_logsumexp_of_valid_tokens() -> None:
    """Logits (log 1, log 2, log 3) have logsumexp log 6; the second token is padding."""
    logits_TE = torch.tensor([[1.0, 2.0, 3.0], [9.0, 9.0, 9.0]], dtype=torch.float64).log()
    record = topk_record(logits_TE, 1, [True, False])
    close(z_loss(record), math.log(6) ** 2)


def test_z_loss_survives_large_logits() -> None:
    assert z_loss(topk_record(torch.full((1, 4), 1e4), 1)).isfinite()
