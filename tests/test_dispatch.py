from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from strategies import MANY, Case, cases, close, route
from torch import Tensor

from moetrain.moe import AllToAll, Draws, Local, MoE, Plan, Routing, keyed
from moetrain.moe.capacity import plan_capacity, plan_dropless
from moetrain.moe.dispatch import combine_rows, gather_rows
from moetrain.testing import simulate_ranks

DIM, HIDDEN = 3, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def small(dropless: bool) -> tuple[Routing, Plan]:
    """12 tokens in 2 groups, 3 experts, K = 2, some padding; with a capacity some are dropped."""
    valid_T = torch.arange(12) % 5 != 3
    record = route(oracle.Router("topk", 2), random(12, 3, seed=1), valid_T)
    plan = plan_dropless(record) if dropless else plan_capacity(record, group_size=6, slots=3)
    return record, plan


BOTH = pytest.mark.parametrize("dropless", [False, True])


# ---- gather and combine --------------------------------------------------------------------------


@MANY
@given(case=cases())
def test_rows_hold_their_tokens_and_zeros_elsewhere(case: Case) -> None:
    plan = case.plan(case.route(case.logits()))
    x_TD = case.numbers(case.tokens, DIM, stream=3) + 9
    rows_RD = gather_rows(x_TD, plan)
    for row, assignment in zip(rows_RD, plan.source_R.tolist(), strict=True):
        empty = assignment == plan.row_TK.numel()
        expected = torch.zeros(DIM).double() if empty else x_TD[assignment // case.router.k]
        assert torch.equal(row, expected)


@MANY
@given(case=cases())
def test_combine_weighs_and_sums_the_rows_of_a_token(case: Case) -> None:
    record = case.route(case.logits())
    plan = case.plan(record)
    rows_RD = case.numbers(plan.source_R.numel(), DIM, stream=3)
    y_TD = combine_rows(rows_RD, record.gate_TK, plan)
    for t in range(case.tokens):
        expected = torch.zeros(DIM, dtype=torch.float64)
        for gate, row in zip(record.gate_TK[t], plan.row_TK[t].tolist(), strict=True):
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


def test_combining_no_rows_gives_zero() -> None:
    """A rank none of whose tokens is valid: dropless, it gets nothing back."""
    record, _ = small(dropless=True)
    record = record._replace(valid_T=torch.zeros(12, dtype=torch.bool))
    plan = plan_dropless(record)
    rows_RD = torch.zeros(0, DIM, dtype=torch.float64, requires_grad=True)
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
    record = route(oracle.Router("topk", 3), logits_TE, torch.ones(1, dtype=torch.bool))
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


# ---- all-to-all ----------------------------------------------------------------------------------


ROUTERS = {
    "switch": oracle.Router("switch", 1),
    "gshard": oracle.Router("gshard", 2),
    "topk": oracle.Router("topk", 3),
}


def build(router: oracle.Router, factor: float | None, experts: range) -> MoE:
    """The layer of 8 experts, holding only those of `experts`."""
    layer = MoE(0, DIM, HIDDEN, 8, router.k, router.kind, capacity_factor=factor).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(2 * random(*parameter.shape, seed=seed))
    for name, weight in list(layer.experts.named_parameters()):
        mine = weight.detach()[experts.start : experts.stop].clone()
        layer.experts.register_parameter(name, torch.nn.Parameter(mine))
    return layer


def step(layer: MoE, x_BLD: Tensor, valid_BL: Tensor, draws: Draws) -> dict[str, Any]:
    """Forward and backward; everything that came of it."""
    x_BLD = x_BLD.clone().requires_grad_()
    y_BLD, stats = layer(x_BLD, valid_BL, "train", draws)
    (y_BLD.sin().sum() + stats.balance_sum + stats.z_sum).backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y_BLD.detach(), "x": x_BLD.grad, "stats": stats, **grads}


def check_ranks(
    num_ranks: int, router: oracle.Router, factor: float | None, valid_BL: Tensor
) -> None:
    """P ranks by all-to-all against one process that holds all experts and the whole batch."""
    num_sequences, length = valid_BL.shape
    x_BLD = random(num_sequences, length, DIM, seed=11)
    token_id_BL = torch.arange(valid_BL.numel()).view_as(valid_BL)
    key = keyed.step_key(0, 1)
    per_rank, held = num_sequences // num_ranks, 8 // num_ranks

    def one_rank() -> dict[str, Any]:
        rank = dist.get_rank()
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        layer = build(router, factor, range(rank * held, (rank + 1) * held))
        assert dist.group.WORLD is not None
        layer.dispatcher = AllToAll(dist.group.WORLD)
        draws = Draws(key, token_id_BL[mine].flatten())
        return step(layer, x_BLD[mine], valid_BL[mine], draws)

    ranks = simulate_ranks(num_ranks, one_rank)
    whole = build(router, factor, range(8))
    assert isinstance(whole.dispatcher, Local)
    alone = step(whole, x_BLD, valid_BL, Draws(key, token_id_BL.flatten()))
    for name in ("y", "x", "experts.w_gate_up", "experts.w_down"):
        close(torch.cat([rank[name] for rank in ranks]), alone[name])
    close(torch.stack([rank["router.weight"] for rank in ranks]).sum(0), alone["router.weight"])
    for name in ("balance_sum", "z_sum"):
        parts = [getattr(rank["stats"], name) for rank in ranks]
        close(torch.stack(parts).sum(), getattr(alone["stats"], name))
    for i, count in enumerate(alone["stats"].ledger):
        parts = [rank["stats"].ledger[i] for rank in ranks]
        assert torch.equal(torch.stack(parts).sum(0), count)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("factor", [0.75, 4.0, None])
@pytest.mark.parametrize("router", ROUTERS)
def test_all_to_all_equals_one_process(router: str, factor: float | None, num_ranks: int) -> None:
    """Outputs, losses, drops and every gradient."""
    valid_BL = torch.arange(8 * 5).view(8, 5) % 7 != 4
    check_ranks(num_ranks, ROUTERS[router], factor, valid_BL)


@pytest.mark.parametrize("factor", [1.0, None])
@pytest.mark.parametrize("empty", [[0], [3], [0, 1, 2], [0, 1, 2, 3]])
def test_ranks_without_a_valid_token_take_part(empty: list[int], factor: float | None) -> None:
    valid_BL = torch.ones(4, 5, dtype=torch.bool)
    valid_BL[empty] = False
    check_ranks(4, ROUTERS["topk"], factor, valid_BL)


@pytest.mark.parametrize("factor", [1.0, None])
def test_all_tokens_to_one_rank(factor: float | None) -> None:
    """The other ranks' experts get no row, and gradient zero instead of none."""

    def one_rank() -> dict[str, Any]:
        rank = dist.get_rank()
        layer = build(ROUTERS["switch"], factor, range(2 * rank, 2 * rank + 2))
        torch.nn.init.zeros_(layer.router.weight)
        assert dist.group.WORLD is not None
        layer.dispatcher = AllToAll(dist.group.WORLD)
        draws = Draws(keyed.step_key(0, 1), torch.arange(5))
        return step(layer, random(1, 5, DIM, seed=rank), torch.ones(1, 5, dtype=torch.bool), draws)

    ranks = simulate_ranks(4, one_rank)
    for rank, outcome in enumerate(ranks):
        assert outcome["stats"].ledger.outcome_EKO[0].sum() == 5
        for name in ("experts.w_gate_up", "experts.w_down"):
            used = [bool(grad.abs().sum() > 0) for grad in outcome[name]]
            assert used == [rank == 0, False]
