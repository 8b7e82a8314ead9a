"""Rows on one rank: gathered, weighed and summed, relaid by expert, turned by block."""

from __future__ import annotations

import pytest
import torch
from dispatching import random
from hypothesis import given
from hypothesis import strategies as st
from strategies import DIM, MANY, Case, cases, close, topk_record
from torch import Tensor

from moetrain.moe import Plan, Routing
from moetrain.moe.capacity import plan_capacity, plan_dropless
from moetrain.moe.rows import (
    Turn,
    are_filled,
    combine_rows,
    gather_rows,
    reorder_experts,
    turn_rows,
    uneven_turn,
)


def small(dropless: bool) -> tuple[Routing, Plan]:
    """12 tokens in 2 groups, 3 experts, K = 2, some padding; with a capacity some are dropped."""
    valid_T = torch.arange(12) % 5 != 3
    record = topk_record(random(12, 3, seed=1), 2, valid_T.tolist())
    plan = plan_dropless(record) if dropless else plan_capacity(record, group_size=6, slots=3)
    return record, plan


BOTH = pytest.mark.parametrize("dropless", [False, True])


# ---- gather and combine --------------------------------------------------------------------------


@MANY
@given(case=cases())
def test_rows_hold_their_tokens_and_zeros_elsewhere(case: Case) -> None:
    plan = case.settle(case.route(case.leaves())).plan
    x_TD = case.normals(case.tokens, DIM, stream=30) + 9
    rows_RD = gather_rows(x_TD, plan)
    for row, assignment in zip(rows_RD, plan.source_R.tolist(), strict=True):
        empty = assignment == plan.row_TK.numel()
        expected = torch.zeros(DIM).double() if empty else x_TD[assignment // case.columns]
        assert torch.equal(row, expected)


@MANY
@given(case=cases())
def test_combine_weighs_and_sums_the_rows_of_a_token(case: Case) -> None:
    _, settled, plan = case.settle(case.route(case.leaves()))
    rows_RD = case.normals(plan.source_R.numel(), DIM, stream=30)
    y_TD = combine_rows(rows_RD, settled.gate_TK, plan)
    for t in range(case.tokens):
        expected = torch.zeros(DIM, dtype=torch.float64)
        for gate, row in zip(settled.gate_TK[t], plan.row_TK[t].tolist(), strict=True):
            if row < len(rows_RD):
                expected = expected + gate * rows_RD[row]
        close(y_TD[t], expected)


@BOTH
def test_gradients_of_gather_and_combine_are_right(dropless: bool) -> None:
    """Against finite differences."""
    record, plan = small(dropless)
    x_TD = random(12, DIM).requires_grad_()
    rows_RD = random(plan.source_R.numel(), DIM, seed=2).requires_grad_()
    gate_TK = record.gate_TK.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, plan), x_TD)
    assert torch.autograd.gradcheck(lambda r, g: combine_rows(r, g, plan), (rows_RD, gate_TK))


def test_gradients_of_combine_with_the_empty_tail_left_off() -> None:
    record, plan = small(dropless=True)
    rows_RD = random(int(plan.count_E.sum()), DIM).requires_grad_()
    gate_TK = record.gate_TK.clone().requires_grad_()
    assert len(rows_RD) < plan.source_R.numel()
    assert torch.autograd.gradcheck(lambda r, g: combine_rows(r, g, plan), (rows_RD, gate_TK))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_combining_no_rows_gives_zero(dtype: torch.dtype) -> None:
    """A rank none of whose tokens is valid: dropless, it gets nothing back."""
    record, _ = small(dropless=True)
    record = record._replace(valid_T=torch.zeros(12, dtype=torch.bool))
    plan = plan_dropless(record)
    rows_RD = torch.zeros(0, DIM, dtype=dtype, requires_grad=True)
    gate_TK = record.gate_TK.clone().requires_grad_()
    y_TD = combine_rows(rows_RD, gate_TK, plan)
    y_TD.sum().backward()
    assert (y_TD == 0).all()
    assert gate_TK.grad is not None
    assert (gate_TK.grad == 0).all()
    assert rows_RD.grad is not None


def test_bf16_rows_are_summed_in_the_precision_of_the_gates() -> None:
    """256 + 1 + 1 is 258; summed in bf16, which knows no 257, it would stay at 256."""
    logits_TE = torch.tensor([[3.0, 2.0, 1.0]])
    record = topk_record(logits_TE, 3)
    plan = plan_dropless(record)
    rows_RD = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16, requires_grad=True)
    gate_TK = torch.ones(1, 3, requires_grad=True)
    y_TD = combine_rows(rows_RD, gate_TK, plan)
    assert y_TD.dtype == torch.bfloat16
    assert y_TD.tolist() == [[258.0]]
    y_TD.sum().backward()
    assert rows_RD.grad is not None
    assert gate_TK.grad is not None
    assert (rows_RD.grad.dtype, gate_TK.grad.dtype) == (torch.bfloat16, torch.float32)
    assert gate_TK.grad.tolist() == [[256.0, 1.0, 1.0]]


# ---- poison --------------------------------------------------------------------------------------


def poisoned(rows_RD: Tensor, plan: Plan) -> Tensor:
    """NaN in every row that the plan leaves empty, as a grouped product may leave behind."""
    empty_R = plan.source_R[: len(rows_RD)] == plan.row_TK.numel()
    assert empty_R.any()
    return torch.where(empty_R[:, None], torch.nan, rows_RD)


@BOTH
def test_poison_in_empty_rows_reaches_no_token(dropless: bool) -> None:
    record, plan = small(dropless)
    clean_RD = random(plan.source_R.numel(), DIM)
    results = []
    for rows_RD in (clean_RD, poisoned(clean_RD, plan)):
        rows_RD = rows_RD.clone().requires_grad_()
        gate_TK = record.gate_TK.clone().requires_grad_()
        y_TD = combine_rows(rows_RD, gate_TK, plan)
        y_TD.square().sum().backward()
        results.append((y_TD, gate_TK.grad, rows_RD.grad))
    for clean, bad in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, bad)


@BOTH
def test_poison_in_gradients_of_empty_rows_reaches_no_token(dropless: bool) -> None:
    _, plan = small(dropless)
    x_TD = random(12, DIM).requires_grad_()
    clean_RD = random(plan.source_R.numel(), DIM)
    clean, bad = (
        torch.autograd.grad(gather_rows(x_TD, plan), x_TD, grad_RD)[0]
        for grad_RD in (clean_RD, poisoned(clean_RD, plan))
    )
    assert clean.isfinite().all()
    assert torch.equal(clean, bad)


@BOTH
def test_poison_in_tokens_without_a_row_is_not_sent(dropless: bool) -> None:
    """Padding, and with a capacity a token that lost everything, holds NaN: no row does."""
    _, plan = small(dropless)
    x_TD = random(12, DIM)
    unsent_T = (plan.row_TK == plan.source_R.numel()).all(1)
    assert unsent_T.any()
    x_TD[unsent_T] = torch.nan
    assert gather_rows(x_TD, plan).isfinite().all()


@BOTH
def test_poison_in_gates_of_choices_without_a_row_reaches_no_expert(dropless: bool) -> None:
    """Rows kept get their gradient; empty rows get zero, whatever gate stands beside them."""
    record, plan = small(dropless)
    gate_TK = record.gate_TK.masked_fill(~record.valid_T[:, None], torch.nan)
    rows_RD = random(plan.source_R.numel(), DIM).requires_grad_()
    y_TD = combine_rows(rows_RD, gate_TK, plan)
    (grad_RD,) = torch.autograd.grad(y_TD[record.valid_T].sum(), rows_RD)
    assert grad_RD.isfinite().all()
    assert (grad_RD[plan.source_R == plan.row_TK.numel()] == 0).all()


@pytest.mark.parametrize("width", [1, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_row_with_one_number_are_filled(dtype: torch.dtype, width: int) -> None:
    """Whichever place it has and however small it is; also where it is no number."""
    smallest = torch.finfo(dtype).tiny
    for value in (1.0, -1.0, smallest, torch.nan, torch.inf):
        assert are_filled(torch.diag(torch.full((width,), value, dtype=dtype))).all()
    assert not are_filled(torch.zeros(5, width, dtype=dtype)).any()


# ---- experts in another order --------------------------------------------------------------------


@MANY
@given(case=cases(), data=st.data())
def test_experts_in_another_order_keep_their_rows(case: Case, data: st.DataObject) -> None:
    """Every assignment finds the same row, every expert has its rows where its turn comes."""
    plan = case.settle(case.route(case.leaves())).plan
    order = data.draw(st.permutations(range(case.experts)))
    moved = reorder_experts(plan, torch.tensor(order))
    num_rows, absent = plan.source_R.numel(), plan.row_TK.numel()
    assert torch.equal(moved.count_E, plan.count_E[torch.tensor(order)])
    assert torch.equal(moved.row_TK == num_rows, plan.row_TK == num_rows)
    for assignment, row in enumerate(moved.row_TK.flatten().tolist()):
        assert row == num_rows or moved.source_R[row] == assignment
    sizes = plan.count_E.tolist()
    if plan.rows_per_expert is not None:
        sizes = [plan.rows_per_expert] * case.experts
    blocks = plan.source_R[: sum(sizes)].split(sizes)
    expected = torch.cat([blocks[expert] for expert in order])
    assert torch.equal(moved.source_R[: sum(sizes)], expected)
    assert (moved.source_R[sum(sizes) :] == absent).all()


# ---- blocks --------------------------------------------------------------------------------------


def turned(rows_RD: Tensor, sizes: list[list[int]]) -> Tensor:
    blocks = iter(rows_RD.split([size for line in sizes for size in line]))
    table = [[next(blocks) for _ in line] for line in sizes]
    return torch.cat([block for column in zip(*table, strict=True) for block in column])


SIZES = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(0, 3), min_size=width, max_size=width), min_size=1, max_size=4
    )
)


@MANY
@given(sizes=SIZES)
def test_uneven_blocks_are_turned_and_turned_back(sizes: list[list[int]]) -> None:
    num_rows = sum(map(sum, sizes))
    rows_RD = torch.arange(num_rows * 2.0).view(-1, 2)
    turn = uneven_turn(torch.tensor(sizes), num_rows)
    there_RD = turn_rows(rows_RD, turn)
    assert torch.equal(there_RD, turned(rows_RD, sizes))
    assert torch.equal(turn_rows(there_RD, turn.back()), rows_RD)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1), (2, 3), (4, 2)])
def test_equal_blocks_are_turned_as_uneven_ones_are(shape: tuple[int, int]) -> None:
    sizes = [[2] * shape[1] for _ in range(shape[0])]
    rows_RD = random(2 * shape[0] * shape[1], DIM)
    there_RD = turn_rows(rows_RD, Turn(shape))
    assert torch.equal(there_RD, turned(rows_RD, sizes))
    assert torch.equal(turn_rows(there_RD, Turn(shape).back()), rows_RD)


@pytest.mark.parametrize(
    "turn",
    [
        *(Turn(shape) for shape in [(1, 3), (6, 1), (2, 3), (3, 2)]),
        uneven_turn(torch.tensor([[2, 0, 1], [1, 2, 0]]), 6),
        uneven_turn(torch.tensor([[4, 2]]), 6),
    ],
    ids=str,
)
def test_the_order_of_a_turn_is_what_turning_does(turn: Turn) -> None:
    rows_RD = random(6, DIM)
    assert torch.equal(rows_RD[turn.order_of(6)], turn_rows(rows_RD, turn))


@pytest.mark.parametrize("even", [True, False])
def test_gradients_of_a_turn_are_right(even: bool) -> None:
    rows_RD = random(6, DIM).requires_grad_()
    turn = Turn((2, 3)) if even else uneven_turn(torch.tensor([[2, 0, 1], [1, 2, 0]]), 6)
    assert torch.autograd.gradcheck(lambda rows: turn_rows(rows, turn), rows_RD)
