"""Experts on a CPU, one after another on their filled rows, give what one gather for all gives."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from dispatching import NUM_EXPERTS, build, check_same, random, step
from hypothesis import given
from hypothesis import strategies as st
from layers import ROUTERS
from oracle_gates import Router
from strategies import DIM
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.moe import Experts, Local, MoE, Packed, Plan, Routing, packed
from moetrain.moe.capacity import plan_capacity
from moetrain.parallel import local_dispatcher

TOP3 = Router("topk", 3)
SOME = torch.arange(8 * 5).view(8, 5) % 7 != 4
"""Eight sequences with some padding."""
CASES = [
    *((TOP3, 0.75, policy) for policy in ("position", "probability", "random", "spill")),
    (TOP3, None, "position"),
    (TOP3, 0.01, "position"),  # few are served
    (TOP3, 8.0, "position"),  # most rows are empty
    (ROUTERS["gshard"], 0.75, "position"),
    (ROUTERS["expert_choice"], 0.75, "position"),
]
IN_EVERY_CASE = pytest.mark.parametrize(("router", "factor", "policy"), CASES, ids=str)


def batch(valid_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, which of them are no padding, and their numbers."""
    x_BLD = random(*valid_BL.shape, DIM, seed=11)
    return x_BLD, valid_BL, torch.arange(valid_BL.numel()).view_as(valid_BL)


def outcome(layer: MoE, valid_BL: Tensor = SOME) -> dict[str, Any]:
    return step(layer, *batch(valid_BL))


def with_dispatcher(layer: MoE, dispatcher: Local | Packed) -> MoE:
    layer.dispatcher = dispatcher
    return layer


@IN_EVERY_CASE
def test_outputs_counts_and_every_gradient_are_those_of_one_gather(
    router: Router, factor: float | None, policy: str
) -> None:
    of = [
        outcome(with_dispatcher(build(router, factor, policy, range(NUM_EXPERTS)), dispatcher))
        for dispatcher in (Packed(), Local())
    ]
    check_same(of[:1], of[1])


WIDTHS, BF16 = (512, 1024), torch.bfloat16
UNITS = [(1024, 32), (512, 16), (0, 8)]
"""Rows of a large expert from which on they are a multiple of what."""


@given(
    counts=st.lists(st.integers(0, 1500), min_size=1, max_size=20),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_groups_hold_all_rows_in_order_and_few_empty_ones(
    counts: list[int], dtype: torch.dtype
) -> None:
    groups = packed.cut(counts, *WIDTHS, dtype)
    assert [count for group in groups for count in group.counts] == counts
    expert = row = place = 0
    for group in groups:
        size = len(group.counts)
        assert group.experts == slice(expert, expert + size)
        assert group.rows == slice(row, row + sum(group.counts))
        assert group.places == slice(place, place + size * group.room)
        expert, row, place = group.experts.stop, group.rows.stop, group.places.stop
        of_bf16 = packed.MANY_ROWS if size > 1 else next(n for at, n in UNITS if group.room >= at)
        multiple = of_bf16 if dtype == torch.bfloat16 else 1
        assert group.room % multiple == 0
        assert all(count <= group.room for count in group.counts)
        if size == 1:
            assert group.room < group.counts[0] + multiple
            continue
        assert size in packed.GROUPS
        assert size * group.room * 1024 <= packed.MOST_NUMBERS
        empty = sum(group.room - count for count in group.counts)
        assert 6 * empty * (3 * 512 * 1024) <= packed.EMPTY_FLOPS * (size - 1)


@pytest.mark.parametrize(
    ("counts", "widths", "sizes"),
    [
        ([256] * 12, WIDTHS, [8, 4]),
        ([512] * 8, WIDTHS, [4, 4]),
        ([2048] * 8, WIDTHS, [1] * 8),
        ([1024, 1010, 512, 40], WIDTHS, [2, 1, 1]),
        ([0] * 8, WIDTHS, [8]),
        ([320, 640, 512, 512, 480, 600, 544, 424], (192, 384), [1, 4, 2, 1]),
    ],
)
def test_experts_that_are_alike_go_together(
    counts: list[int], widths: tuple[int, int], sizes: list[int]
) -> None:
    assert [len(group.counts) for group in packed.cut(counts, *widths, BF16)] == sizes


def test_small_experts_come_in_few_shapes() -> None:
    rooms = {packed.cut([count], 192, 384, BF16)[0].room for count in range(1, 513)}
    assert rooms == {128, 256, 384, 512}


def test_no_expert_has_empty_rows_where_shapes_cost_nothing() -> None:
    assert [packed.cut([n], 192, 384, torch.float32)[0].room for n in (0, 1, 77)] == [0, 1, 77]


@pytest.mark.parametrize("factor", [0.75, None])
def test_experts_without_tokens_get_gradient_zero(factor: float | None) -> None:
    """All tokens choose experts 0 to 2."""
    layer = with_dispatcher(build(TOP3, factor, "position", range(NUM_EXPERTS)), Packed())
    torch.nn.init.zeros_(layer.router.weight)
    found = outcome(layer)
    for name in ("experts.w_gate_up", "experts.w_down"):
        is_zero_E = (found[name] == 0).flatten(1).all(1)
        assert is_zero_E.tolist() == [False] * 3 + [True] * 5


@pytest.mark.parametrize("factor", [0.75, None])
def test_a_batch_of_padding_gives_zeros(factor: float | None) -> None:
    layer = with_dispatcher(build(TOP3, factor, "position", range(NUM_EXPERTS)), Packed())
    found = outcome(layer, torch.zeros_like(SOME))
    for name in ("y", "x", "experts.w_gate_up", "experts.w_down"):
        assert not found[name].any(), name


def test_gradients_are_those_of_finite_differences() -> None:
    """By tokens, gates and weights: eight tokens, three experts, some assignments lost."""
    expert_TK = torch.tensor([[0, 1], [0, 2], [0, 1], [2, 0], [0, 1], [1, 3], [3, 3], [2, 1]])
    plan = plan_of(expert_TK, slots=3)
    assert (plan.row_TK == len(plan.source_R)).any()

    def run(x_TD: Tensor, gate_TK: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        experts = Experts(3, 4, 5)
        # As the values themselves, so that their gradients are asked for.
        experts.local_weights = lambda: (w_gate_up, w_down)  # type: ignore[method-assign]
        dispatcher = Packed()
        return dispatcher.combine(experts, dispatcher.dispatch(x_TD, plan), gate_TK)

    shapes = [(8, 4), (8, 2), (3, 4, 10), (3, 5, 4)]
    inputs = [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    torch.autograd.gradcheck(run, inputs)


def test_rows_in_any_order_stay_where_they_are() -> None:
    """Seven rows, of which four go to the first and the third of three experts; the others hold
    garbage, and come back as zeros, as does their gradient."""
    row_F, counts = torch.tensor([5, 0, 3, 1]), [3, 0, 1]
    rows_RD, w_gate_up, w_down = (
        random(*shape, seed=i).requires_grad_()
        for i, shape in enumerate([(7, 4), (3, 4, 10), (3, 5, 4)])
    )
    with torch.no_grad():
        rows_RD[[2, 4, 6]] = torch.nan

    def run(rows_FD: Tensor, *weights: Tensor) -> Tensor:
        return packed.run_rows(rows_RD.index_copy(0, row_F, rows_FD), row_F, counts, *weights)

    leaves = rows_RD, w_gate_up, w_down
    result_RD = packed.run_rows(rows_RD, row_F, counts, w_gate_up, w_down)
    for row, expert in [(5, 0), (0, 0), (3, 0), (1, 2)]:
        gate, up = (rows_RD[row] @ w_gate_up[expert]).chunk(2)
        expected = (torch.nn.functional.silu(gate) * up) @ w_down[expert]
        torch.testing.assert_close(result_RD[row], expected)
    assert not result_RD[[2, 4, 6]].any()
    grad_RD = random(7, 4, seed=9)
    grad_RD[[2, 4, 6]] = torch.nan
    grad_rows_RD, *grads = torch.autograd.grad(result_RD, leaves, grad_RD)
    assert not grad_rows_RD[[2, 4, 6]].any()
    assert all(grad.isfinite().all() for grad in grads)
    rows_FD = rows_RD.detach()[row_F].requires_grad_()
    assert torch.autograd.gradcheck(run, (rows_FD, w_gate_up, w_down))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_in_any_order_give_the_bits_of_sorted_ones(dtype: torch.dtype) -> None:
    """Also where groups have room for more rows than they get."""
    counts = [3, 0, 40, 1]
    row_F = torch.randperm(60, generator=torch.Generator().manual_seed(1))[: sum(counts)]
    drawn = [random(*shape, seed=i) for i, shape in enumerate([(60, 8), (4, 8, 12), (4, 6, 8)])]
    grad_RD = random(60, 8, seed=7).to(dtype)

    def outcome(rows_RD: Tensor, row_F: Tensor, grad_RD: Tensor) -> list[Tensor]:
        leaves = [one.to(dtype).requires_grad_() for one in (rows_RD, *drawn[1:])]
        result_RD = packed.run_rows(leaves[0], row_F, counts, *leaves[1:])
        return [result_RD, *torch.autograd.grad(result_RD, leaves, grad_RD)]

    y_RD, grad_x_RD, *grads = outcome(drawn[0], row_F, grad_RD)
    sorted_F = torch.arange(len(row_F))
    y_FD, grad_x_FD, *others = outcome(drawn[0][row_F], sorted_F, grad_RD[row_F])
    for one, other in zip(
        [y_RD[row_F], grad_x_RD[row_F], *grads], [y_FD, grad_x_FD, *others], strict=True
    ):
        assert torch.equal(one, other)


def plan_of(expert_TK: Tensor, slots: int) -> Plan:
    nothing = torch.zeros(len(expert_TK), 3)
    routing = Routing(
        expert_TK,
        torch.ones_like(expert_TK, dtype=torch.float32),
        prob_TE=nothing,
        logits_TE=nothing,
        score_TE=nothing,
        sampled_TK=expert_TK < 3,
        valid_T=torch.ones(len(expert_TK), dtype=torch.bool),
    )
    return plan_capacity(routing, len(expert_TK), slots)


def test_recomputed_it_gives_the_same_bits() -> None:
    def run(recompute: bool) -> list[Tensor]:
        layer = with_dispatcher(build(TOP3, 0.75, "position", range(NUM_EXPERTS)), Packed())
        x_BLD = batch(SOME)[0].requires_grad_()

        def forward(x_BLD: Tensor) -> Tensor:
            return layer(x_BLD, SOME, "eval").y_BLD

        y_BLD = checkpoint(forward, x_BLD, use_reentrant=False) if recompute else forward(x_BLD)
        y_BLD.sin().sum().backward()
        return [y_BLD, x_BLD.grad, *(parameter.grad for parameter in layer.parameters())]

    for plain, recomputed in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("keeps", [True, False])
def test_without_gradients_nothing_of_an_expert_outlives_it(
    keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden: list[weakref.ref[Tensor]] = []

    def watch(hidden_n2F: Tensor) -> Tensor:
        assert all((one() is not None) == keeps for one in hidden)
        hidden.append(weakref.ref(hidden_n2F))
        return forward(hidden_n2F)

    forward = packed.swiglu_forward
    monkeypatch.setattr(packed, "swiglu_forward", watch)
    monkeypatch.setattr(packed, "GROUPS", ())  # one at a time
    layer = with_dispatcher(build(TOP3, 0.75, "position", range(NUM_EXPERTS)), Packed())
    with torch.set_grad_enabled(keeps):
        layer(batch(SOME)[0], SOME, "eval")
    assert len(hidden) == NUM_EXPERTS


def test_in_bf16_it_is_as_near_to_the_truth_as_one_gather() -> None:
    """Every result and gradient, by its distance from fp64 as a share of the norm."""

    def of(dispatcher: Local | Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        layer = with_dispatcher(build(TOP3, 0.75, "position", range(NUM_EXPERTS)), dispatcher)
        for parameter in layer.experts.parameters():
            parameter.data = parameter.data.bfloat16().to(dtype)
        x_BLD = batch(SOME)[0].bfloat16().to(dtype).requires_grad_()
        layer(x_BLD, SOME, "eval").y_BLD.double().sin().sum().backward()
        grads = {name: parameter.grad for name, parameter in layer.experts.named_parameters()}
        return {"x": x_BLD.grad, **grads}  # type: ignore[dict-item]

    truth = of(Local(), torch.float64)
    found, other = of(Packed(), torch.bfloat16), of(Local(), torch.bfloat16)
    for name, exact in truth.items():
        errors = [(one[name].double() - exact).norm() / exact.norm() for one in (found, other)]
        assert errors[0] <= 1.1 * errors[1], name


def test_it_is_for_cpus_and_for_passes_that_are_not_compiled() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert isinstance(local_dispatcher(cpu), Packed)
    assert isinstance(local_dispatcher(cpu, needs_rows=True), Local)
    assert isinstance(local_dispatcher(gpu), Local)
