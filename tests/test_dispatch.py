from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from layers import GSHARD, HIDDEN, ROUTERS, SWITCH, WAYS
from oracle_gates import Router
from strategies import DIM, MANY, Case, cases, close, gate_of, topk_record
from torch import Tensor

from moetrain.moe import AllToAll, Draws, MoE, Plan, Routing, keyed
from moetrain.moe.capacity import plan_capacity, plan_dropless
from moetrain.moe.rows import combine_rows, gather_rows
from moetrain.testing import simulate_ranks


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


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


# ---- all-to-all ----------------------------------------------------------------------------------


NUM_EXPERTS = 8


def wider(kind: str) -> Router:
    """The gate for eight experts."""
    router = ROUTERS[kind]
    return Router("dense", NUM_EXPERTS) if kind == "dense" else router


def build(
    router: Router, factor: float | None, policy: str, experts: range, of: int = NUM_EXPERTS
) -> MoE:
    """The layer of so many experts, holding only those of `experts`."""
    layer = MoE(
        0,
        DIM,
        HIDDEN,
        of,
        gate_of(router),
        capacity_factor=factor,
        drop_policy=policy,  # type: ignore[arg-type]
    ).double()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(2 * random(*parameter.shape, seed=seed))
    for name, weight in list(layer.experts.named_parameters()):
        mine = weight.detach()[experts.start : experts.stop].clone()
        layer.experts.register_parameter(name, torch.nn.Parameter(mine))
    return layer


def step(layer: MoE, x_BLD: Tensor, valid_BL: Tensor, token_id_BL: Tensor) -> dict[str, Any]:
    """Forward and backward; everything that came of it."""
    x_BLD = x_BLD.clone().requires_grad_()
    draws = Draws(keyed.step_key(0, 1), token_id_BL.flatten())
    y_BLD, stats, *_ = layer(x_BLD, valid_BL, "train", draws, token_id_BL % 11)
    (y_BLD.sin().sum() + stats.balance_sum + stats.z_sum).backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y_BLD.detach(), "x": x_BLD.grad, "stats": stats, **grads}


def check_ranks(
    num_ranks: int, router: Router, factor: float | None, policy: str, valid_BL: Tensor
) -> None:
    """P ranks by all-to-all against one process that holds all experts and the whole batch."""
    num_sequences, length = valid_BL.shape
    x_BLD = random(num_sequences, length, DIM, seed=11)
    token_id_BL = torch.arange(valid_BL.numel()).view_as(valid_BL)
    per_rank, held = num_sequences // num_ranks, NUM_EXPERTS // num_ranks

    def one_rank() -> dict[str, Any]:
        rank = dist.get_rank()
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        layer = build(router, factor, policy, range(rank * held, (rank + 1) * held))
        assert dist.group.WORLD is not None
        layer.dispatcher = AllToAll(dist.group.WORLD)
        return step(layer, x_BLD[mine], valid_BL[mine], token_id_BL[mine])

    ranks = simulate_ranks(num_ranks, one_rank)
    alone = step(build(router, factor, policy, range(NUM_EXPERTS)), x_BLD, valid_BL, token_id_BL)
    check_same(ranks, alone)


def check_same(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """What the ranks hold adds up, or lies side by side, to what one process has."""
    for name, expected in alone.items():
        if name.startswith("router."):
            close(torch.stack([rank[name] for rank in ranks]).sum(0), expected)
        elif name != "stats":
            close(torch.cat([rank[name] for rank in ranks]), expected)
    for name in ("balance_sum", "z_sum"):
        parts = [getattr(rank["stats"], name) for rank in ranks]
        close(torch.stack(parts).sum(), getattr(alone["stats"], name))
    for record in ("demand", "gate_mass"):
        columns = zip(*(getattr(rank["stats"], record) for rank in ranks), strict=True)
        for expected, parts in zip(getattr(alone["stats"], record), columns, strict=True):
            close(torch.stack(parts).sum(0).double(), expected.double())
    for i, count in enumerate(alone["stats"].ledger):
        parts = [rank["stats"].ledger[i] for rank in ranks]
        assert torch.equal(torch.stack(parts).sum(0), count)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(("kind", "factor", "policy"), WAYS)
def test_all_to_all_equals_one_process(
    kind: str, factor: float | None, policy: str, num_ranks: int
) -> None:
    """Outputs, losses, drops and every gradient, for every gate and drop policy."""
    valid_BL = torch.arange(4 * 5).view(4, 5) % 7 != 4
    check_ranks(num_ranks, wider(kind), factor, policy, valid_BL)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("factor", [0.75, 4.0, None])
@pytest.mark.parametrize("router", [SWITCH, GSHARD, Router("topk", 3)], ids=lambda r: r.kind)
def test_one_to_eight_ranks_equal_one_process(
    router: Router, factor: float | None, num_ranks: int
) -> None:
    valid_BL = torch.arange(8 * 5).view(8, 5) % 7 != 4
    check_ranks(num_ranks, router, factor, "position", valid_BL)


@pytest.mark.parametrize(
    ("factor", "policy"), [(1.0, "position"), (1.0, "spill"), (None, "position")]
)
@pytest.mark.parametrize("empty", [[0], [3], [0, 1, 2], [0, 1, 2, 3]])
def test_ranks_without_a_valid_token_take_part(
    empty: list[int], factor: float | None, policy: str
) -> None:
    valid_BL = torch.ones(4, 5, dtype=torch.bool)
    valid_BL[empty] = False
    check_ranks(4, Router("topk", 3), factor, policy, valid_BL)


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_rank_without_a_valid_token_gets_gradients_of_zero(kind: str) -> None:
    """Rank 1 has nothing to send: its router's gradient is zero and not None, its experts work."""

    def one_rank() -> dict[str, Any]:
        rank = dist.get_rank()
        layer = build(wider(kind), 0.75, "position", range(4 * rank, 4 * rank + 4))
        assert dist.group.WORLD is not None
        layer.dispatcher = AllToAll(dist.group.WORLD)
        valid_BL = torch.full((2, 5), rank == 0)
        ids_BL = torch.arange(10).view(2, 5) + 10 * rank
        return step(layer, random(2, 5, DIM, seed=rank), valid_BL, ids_BL)

    full, empty = simulate_ranks(2, one_rank)
    assert full["stats"].ledger.tokens == 10
    for name, gradient in empty.items():
        if name.startswith("router.") or name in ("x", "y"):
            assert gradient is not None
            assert (gradient == 0).all(), name
    assert all(part["experts.w_down"].isfinite().all() for part in (full, empty))


@pytest.mark.parametrize("factor", [0.75, None])
def test_64_ranks_equal_one_process(factor: float | None) -> None:
    """One expert and one sequence on each: a real layer, forward and backward."""
    num_ranks, router = 64, Router("topk", 2)
    x_BLD, valid_BL = random(num_ranks, 4, DIM, seed=5), torch.ones(num_ranks, 4, dtype=torch.bool)
    ids_BL = torch.arange(num_ranks * 4).view(num_ranks, 4)

    def one_rank() -> dict[str, Any]:
        rank = dist.get_rank()
        mine = slice(rank, rank + 1)
        layer = build(router, factor, "position", range(rank, rank + 1), of=num_ranks)
        assert dist.group.WORLD is not None
        layer.dispatcher = AllToAll(dist.group.WORLD)
        return step(layer, x_BLD[mine], valid_BL[mine], ids_BL[mine])

    alone = build(router, factor, "position", range(num_ranks), of=num_ranks)
    ranks = simulate_ranks(num_ranks, one_rank)
    check_same(ranks, step(alone, x_BLD, valid_BL, ids_BL))


@pytest.mark.parametrize("factor", [1.0, None])
def test_all_tokens_to_one_rank(factor: float | None) -> None:
    """The other ranks' experts get no row, and gradient zero instead of none."""

    def one_rank() -> dict[str, Any]:
        rank = dist.get_rank()
        layer = build(SWITCH, factor, "position", range(2 * rank, 2 * rank + 2))
        torch.nn.init.zeros_(layer.router.weight)
        assert dist.group.WORLD is not None
        layer.dispatcher = AllToAll(dist.group.WORLD)
        valid_BL, ids_BL = torch.ones(1, 5, dtype=torch.bool), torch.arange(5)[None]
        return step(layer, random(1, 5, DIM, seed=rank), valid_BL, ids_BL)

    ranks = simulate_ranks(4, one_rank)
    for rank, outcome in enumerate(ranks):
        assert outcome["stats"].ledger.outcome_EKO[0].sum() == 5
        for name in ("experts.w_gate_up", "experts.w_down"):
            used = [bool(grad.abs().sum() > 0) for grad in outcome[name]]
            assert used == [rank == 0, False]
