"""Every dispatcher on P ranks equals one process that holds all experts and the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from dispatching import (
    NUM_EXPERTS,
    PLAIN,
    Way,
    build,
    check_same,
    connect,
    every_way,
    random,
    step,
)
from layers import GSHARD, ROUTERS, SWITCH, WAYS
from on_device import as_on_a_gpu
from oracle_gates import Router
from strategies import DIM
from torch import Tensor

from moetrain.moe import AllToAll, Dispatcher, Experts, MoE, Plan, packed
from moetrain.moe.experts import Feed
from moetrain.testing import simulate_ranks


def wider(kind: str) -> Router:
    """The gate for eight experts."""
    router = ROUTERS[kind]
    return Router("dense", NUM_EXPERTS) if kind == "dense" else router


def on_ranks(
    num_ranks: int,
    router: Router,
    factor: float | None,
    policy: str,
    valid_BL: Tensor,
    way: Way = PLAIN,
    dispatcher: Callable[[MoE], None] | None = None,
) -> list[dict[str, Any]]:
    """One step of the layer on P ranks, which share experts and sequences."""
    x_BLD, token_id_BL = batch(valid_BL)
    per_rank, held = len(valid_BL) // num_ranks, NUM_EXPERTS // num_ranks

    def one_rank() -> dict[str, Any]:
        rank = dist.get_rank()
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        layer = build(router, factor, policy, range(rank * held, (rank + 1) * held))
        connect(layer, way)
        if dispatcher is not None:
            dispatcher(layer)
        return step(layer, x_BLD[mine], valid_BL[mine], token_id_BL[mine])

    return simulate_ranks(num_ranks, one_rank)


def batch(valid_BL: Tensor) -> tuple[Tensor, Tensor]:
    x_BLD = random(*valid_BL.shape, DIM, seed=11)
    return x_BLD, torch.arange(valid_BL.numel()).view_as(valid_BL)


def check_ranks(
    num_ranks: int,
    router: Router,
    factor: float | None,
    policy: str,
    valid_BL: Tensor,
    way: Way = PLAIN,
) -> list[dict[str, Any]]:
    """P ranks against one process that holds all experts and the whole batch."""
    ranks = on_ranks(num_ranks, router, factor, policy, valid_BL, way)
    x_BLD, token_id_BL = batch(valid_BL)
    alone = step(build(router, factor, policy, range(NUM_EXPERTS)), x_BLD, valid_BL, token_id_BL)
    check_same(ranks, alone)
    return ranks


def check_bitwise(ranks: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    for rank, other in zip(ranks, others, strict=True):
        for name, value in rank.items():
            if name != "stats":
                assert torch.equal(value, other[name]), name


SOME = torch.arange(8 * 5).view(8, 5) % 7 != 4
"""Eight sequences with some padding."""
EVERY_WAY = [(num_ranks, way) for num_ranks in (2, 4, 8) for way in every_way(num_ranks)]
IN_EVERY_WAY = pytest.mark.parametrize(("num_ranks", "way"), EVERY_WAY, ids=str)
BOTH = pytest.mark.parametrize("factor", [0.75, None])
EVERYWHERE = pytest.mark.parametrize(
    "runs", [nullcontext, as_on_a_gpu], ids=["on a CPU", "as on a GPU"]
)


@EVERYWHERE
@BOTH
@IN_EVERY_WAY
def test_every_dispatcher_equals_one_process(
    num_ranks: int,
    way: Way,
    factor: float | None,
    runs: Callable[[], AbstractContextManager[None]],
) -> None:
    """Outputs, losses, drops and every gradient; bitwise those of a plain all-to-all in as many
    chunks. (A batched product may round otherwise at another number of experts.)"""
    router = Router("topk", 3)
    with runs():
        ranks = check_ranks(num_ranks, router, factor, "position", SOME, way)
        if way.dispatch != "all_gather":
            same = Way(chunks=way.chunks)
            check_bitwise(ranks, on_ranks(num_ranks, router, factor, "position", SOME, same))


@pytest.mark.parametrize("way", every_way(4), ids=str)
def test_a_cpu_multiplies_no_empty_slot(monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    """As many rows reach the experts as assignments were kept."""
    multiplied = []

    def run_rows(rows_RD: Tensor, row_F: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        multiplied.append(len(row_F))
        assert sum(counts) == len(row_F)
        return packed.run_rows(rows_RD, row_F, counts, *weights)

    monkeypatch.setattr("moetrain.moe.experts.run_rows", run_rows)
    ranks = on_ranks(4, Router("topk", 3), 2.0, "position", SOME, way)
    ledgers = [rank["stats"].ledger for rank in ranks]
    kept = sum(int(ledger.row_E.sum()) for ledger in ledgers)
    assert sum(multiplied) == kept < sum(int(ledger.slots) for ledger in ledgers)


@pytest.mark.parametrize("way", every_way(4), ids=str)
def test_tokens_of_zeros_are_no_empty_slots_to_whoever_sent_them(
    monkeypatch: pytest.MonkeyPatch, way: Way
) -> None:
    x_BLD, token_id_BL = batch(SOME)
    x_BLD[::3, 1:3] = 0
    monkeypatch.setattr("test_dispatch.batch", lambda _: (x_BLD, token_id_BL))
    check_ranks(4, Router("topk", 3), 0.75, "position", SOME, way)


@BOTH
@pytest.mark.parametrize("way", every_way(4), ids=str)
@pytest.mark.parametrize("empty", [[0, 1], [6, 7], [0, 1, 2, 3, 4, 5], list(range(8))])
def test_ranks_without_a_valid_token_take_part_in_every_dispatcher(
    empty: list[int], way: Way, factor: float | None
) -> None:
    valid_BL = torch.ones(8, 5, dtype=torch.bool)
    valid_BL[empty] = False
    check_ranks(4, Router("topk", 3), factor, "position", valid_BL, way)


@BOTH
@pytest.mark.parametrize("way", every_way(4), ids=str)
def test_experts_without_tokens_get_gradient_zero_from_every_dispatcher(
    way: Way, factor: float | None
) -> None:
    """All tokens choose the first expert: seven have none, three ranks nothing to compute."""

    def prefer_the_first(layer: MoE) -> None:
        torch.nn.init.zeros_(layer.router.weight)

    ranks = on_ranks(4, SWITCH, factor, "position", SOME, way, prefer_the_first)
    for number, rank in enumerate(ranks):
        for name in ("experts.w_gate_up", "experts.w_down"):
            used = [bool(grad.abs().sum() > 0) for grad in rank[name]]
            assert used == [number == 0, False]


class _Poison(torch.autograd.Function):
    """Puts NaN into the gradient of chosen rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(chosen)
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (chosen,) = ctx.saved_tensors
        return grad.masked_fill(chosen, torch.nan), None


class Poisoned(NamedTuple):
    """Experts that leave NaN in every empty row, in results and in gradients."""

    experts: Experts
    seen: list[int]

    def feed(self) -> PoisonedFeed:
        return PoisonedFeed(self.experts.feed(), self.seen)

    def split(self, num_parts: int) -> list[PoisonedFeed]:
        return [PoisonedFeed(part, self.seen) for part in self.experts.split(num_parts)]


class PoisonedFeed(NamedTuple):
    """Some of them."""

    clean: Feed
    seen: list[int]

    def takes_any_order(self, rows: Tensor) -> bool:
        return self.clean.takes_any_order(rows)

    def __call__(self, rows: Tensor, counts: list[int] | None) -> Tensor:
        return self.poisoned(rows, lambda rows: self.clean(rows, counts))

    def in_place(self, rows: Tensor, row_N: Tensor, counts: list[int]) -> Tensor:
        return self.poisoned(rows, lambda rows: self.clean.in_place(rows, row_N, counts))

    def poisoned(self, rows: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        empty = (rows == 0).all(-1, keepdim=True)
        self.seen.append(int(empty.sum()))
        return run(_Poison.apply(rows, empty)).masked_fill(empty, torch.nan)


class WithPoison:
    """A dispatcher whose experts are poisoned."""

    def __init__(self, dispatcher: Dispatcher, seen: list[int]):
        self.dispatcher, self.seen = dispatcher, seen

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Any:
        return self.dispatcher.dispatch(x_TD, plan)

    def combine(self, experts: Experts, arrived: Any, gate_TK: Tensor) -> Tensor:
        return self.dispatcher.combine(Poisoned(experts, self.seen), arrived, gate_TK)  # type: ignore[arg-type]


@EVERYWHERE
@IN_EVERY_WAY
def test_poison_in_empty_rows_reaches_nothing_by_any_dispatcher(
    num_ranks: int, way: Way, runs: Callable[[], AbstractContextManager[None]]
) -> None:
    """Whether they are multiplied or not."""
    seen: list[int] = []

    def poison(layer: MoE) -> None:
        layer.dispatcher = WithPoison(layer.dispatcher, seen)

    arguments = (num_ranks, Router("topk", 3), 1.5, "position", SOME, way)
    with runs():
        check_bitwise(on_ranks(*arguments, poison), on_ranks(*arguments))
    assert sum(seen) > 0


# ---- all-to-all with every gate ------------------------------------------------------------------


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
    check_ranks(num_ranks, router, factor, "position", SOME)


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
