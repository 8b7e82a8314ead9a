"""Dispatchers between processes, where collectives are really under way at once, and compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

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
    random,
    step,
)
from oracle_gates import Router
from strategies import DIM
from torch import Tensor, nn

from moetrain.moe import MoE
from moetrain.testing import RankPool

ROUTER = Router("topk", 3)
LENGTH = 40


def batch(num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences for each rank, of which the first has padding alone."""
    shape = 2 * num_ranks, LENGTH
    valid_BL = torch.arange(2 * num_ranks * LENGTH).view(shape) % 7 != 4
    valid_BL[:2] = False
    return random(*shape, DIM, seed=11), valid_BL, torch.arange(valid_BL.numel()).view(shape)


def spread(way: Way, factor: float | None) -> MoE:
    rank, held = dist.get_rank(), NUM_EXPERTS // dist.get_world_size()
    layer = build(ROUTER, factor, "position", range(rank * held, (rank + 1) * held))
    connect(layer, way)
    return layer


def steps(ways: list[Way], factor: float | None) -> list[dict[str, Any]]:
    """A step by every way, on this rank's sequences."""
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    return [
        step(spread(way, factor), *(tensor[mine] for tensor in batch(dist.get_world_size())))
        for way in ways
    ]


def compare(pool: RankPool, num_ranks: int, ways: list[Way], factor: float | None) -> None:
    alone = step(build(ROUTER, factor, "position", range(NUM_EXPERTS)), *batch(num_ranks))
    for ranks in zip(*pool.run(steps, ways, factor), strict=True):
        check_same(list(ranks), alone)


BOTH = pytest.mark.parametrize("factor", [0.75, None])


@BOTH
def test_two_processes_equal_one(ranks2: RankPool, factor: float | None) -> None:
    """One of them without a valid token."""
    ways = [PLAIN, Way(chunks=4), Way("two_level", 2, 2), Way("all_gather")]
    compare(ranks2, 2, ways, factor)


@BOTH
def test_four_processes_equal_one(ranks4: RankPool, factor: float | None) -> None:
    ways = [Way(chunks=2), Way("two_level", 2), Way("two_level", 2, 2), Way("all_gather")]
    compare(ranks4, 4, ways, factor)


def compiled_and_not(way: Way) -> list[list[Tensor]]:
    """Outputs and gradients of a compiled layer with something beside it, and of a plain one."""
    x_BLD, valid_BL, _ = (tensor[:2] for tensor in batch(dist.get_world_size()))
    valid_BL = torch.ones_like(valid_BL)
    layer, beside = spread(way, 0.75), nn.Linear(DIM, DIM).double()
    whole = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (layer.forward, whole):
        x_BLD = x_BLD.detach().requires_grad_()
        layer.zero_grad()
        y_BLD, stats, shared_BLD, *_ = forward(
            x_BLD, valid_BL, "train", meanwhile=partial(beside, x_BLD)
        )
        (y_BLD.sin().sum() + shared_BLD.cos().sum() + stats.balance_sum).backward()
        grads = [weight.grad.clone() for weight in layer.parameters()]  # type: ignore[union-attr]
        results.append([y_BLD.detach(), x_BLD.grad, *grads])
    return results  # type: ignore[return-value]


@pytest.mark.parametrize("way", [Way("two_level", 2, 2), Way("all_gather")], ids=str)
def test_a_layer_with_a_capacity_compiles_as_one_graph(ranks2: RankPool, way: Way) -> None:
    """With what is computed beside it, and with its collectives."""
    for plain, compiled in ranks2.run(compiled_and_not, way, timeout=240):
        for one, other in zip(plain, compiled, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
