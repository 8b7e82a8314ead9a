"""What dispatchers send, and when: starts, waits and products in order, collectives and bytes."""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from dispatching import NUM_EXPERTS, PLAIN, Way, build, connect, random
from layers import HIDDEN
from oracle_gates import Router
from strategies import DIM
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.moe import MoE
from moetrain.testing import simulate_ranks

RANKS = 4
SEQUENCES, LENGTH, TOP_K, FACTOR = 2, 6, 3, 1.0
TOKENS = SEQUENCES * LENGTH
SLOTS = 3  # ⌈1.0 · 3 · 6 / 8⌉ of each expert, for each sequence
ROWS = NUM_EXPERTS * SEQUENCES * SLOTS
ITEM = 8
"""Bytes of an fp64 and of an int64."""

EVENTS = {
    "all_to_all_single": "send",
    "all_gather_into_tensor": "gather",
    "wait_tensor": "wait",
    "bmm": "experts",
    "mm": "experts",
    "tanh": "beside",
    "tanh_backward": "beside",
}

ORDERS = {
    "all_to_all": (
        Way(),
        "send beside wait experts send wait",
        "send wait experts send beside wait",
    ),
    "chunks": (
        Way(chunks=2),
        "send send beside wait experts send wait experts send wait wait",
        "send send wait experts send wait experts send beside wait wait",
    ),
    # inside the node, then across; back across the nodes, then inside
    "two_level": (
        Way("two_level", 2),
        "send wait send beside wait experts send wait send wait",
        "send wait send wait experts send beside wait send wait",
    ),
    "two_level chunks": (
        Way("two_level", 2, 2),
        "send send wait send wait send beside wait experts send wait experts send "
        "wait send wait send wait wait",
        "send send wait send wait send wait experts send wait experts send beside "
        "wait send wait send wait wait",
    ),
    # tokens and tables set out, then gates; shares are exchanged. Backward: shares, gates, tokens
    "all_gather": (
        Way("all_gather"),
        "gather gather beside gather wait wait experts wait send wait",
        "send wait send experts send wait beside wait",
    ),
}


class Event(NamedTuple):
    kind: str
    bytes: int
    """That a collective sends, what stays on the rank included."""


class Recorder(TorchDispatchMode):
    """Notes the collectives, waits and products of this rank, in the order in which they start."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in EVENTS and (name not in ("mm", "bmm") or is_of_experts(*args)):
            sent = args[0].numel() * args[0].element_size() if "all_" in name else 0
            self.events.append(Event(EVENTS[name], sent))
        return func(*args, **(kwargs or {}))

    def order(self) -> str:
        """What happened; what happens several times in a row counts once, but for collectives."""
        kinds = [event.kind for event in self.events]
        words = []
        for kind, times in groupby(kinds):
            words += [kind] * (1 if kind in ("experts", "beside") else len(list(times)))
        return " ".join(words)

    def collectives(self) -> list[int]:
        """The bytes of every collective."""
        return [event.bytes for event in self.events if event.kind in ("send", "gather")]


def is_of_experts(a: Tensor, b: Tensor) -> bool:
    """Whether a product is of an expert's weight or its gradient, and not the router's."""
    return bool({HIDDEN, 2 * HIDDEN} & {*a.shape, *b.shape})


class Pass(NamedTuple):
    forward: Recorder
    backward: Recorder


def record(way: Way, factor: float | None, skewed: bool = False) -> list[Pass]:
    """One forward and backward pass on every rank, with a tanh beside the experts."""

    def one_rank() -> Pass:
        rank, held = dist.get_rank(), NUM_EXPERTS // RANKS
        experts = range(rank * held, (rank + 1) * held)
        layer = build(Router("topk", TOP_K), factor, "position", experts)
        if skewed:
            torch.nn.init.zeros_(layer.router.weight)
        connect(layer, way)
        return recorded_step(layer, rank)

    return simulate_ranks(RANKS, one_rank)


def recorded_step(layer: MoE, rank: int) -> Pass:
    x_BLD = random(SEQUENCES, LENGTH, DIM, seed=rank).requires_grad_()
    valid_BL = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    recorders = Pass(Recorder(), Recorder())
    with recorders.forward:
        y_BLD, _, beside, _ = layer(x_BLD, valid_BL, "train", meanwhile=lambda: x_BLD.tanh())
    assert beside is not None
    with recorders.backward:
        (y_BLD + beside).sum().backward()
    return recorders


@pytest.mark.parametrize("factor", [FACTOR, None])
@pytest.mark.parametrize(("way", "forward", "backward"), ORDERS.values(), ids=ORDERS.keys())
def test_nothing_is_waited_for_before_all_that_can_be_done_is_started(
    way: Way, forward: str, backward: str, factor: float | None
) -> None:
    """Dropless, the counts go ahead, by as many hops as the rows."""
    if factor is None and way.dispatch != "all_gather":
        forward = " ".join(["send wait"] * (1 + (way.nodes > 1)) + [forward])
    for rank in record(way, factor):
        assert rank.forward.order() == forward
        assert rank.backward.order() == backward


BUFFER = ROWS * DIM * ITEM
"""What a rank sends to all ranks together, with a capacity."""
MINE, GATES, COUNTS = TOKENS * DIM * ITEM, TOKENS * TOP_K * ITEM, NUM_EXPERTS * ITEM
CAPACITY = {
    "all_to_all": (Way(), [BUFFER] * 2, [BUFFER] * 2),
    "chunks": (Way(chunks=2), [BUFFER // 2] * 4, [BUFFER // 2] * 4),
    "two_level": (Way("two_level", 2), [BUFFER] * 4, [BUFFER] * 4),
    "two_level chunks": (Way("two_level", 2, 2), [BUFFER // 2] * 8, [BUFFER // 2] * 8),
    # to every rank: tokens, where they are to go, gates; then everybody's sums. All come back but
    # the tables.
    "all_gather": (
        Way("all_gather"),
        [MINE, GATES + COUNTS, GATES, RANKS * MINE],
        [RANKS * MINE, RANKS * GATES, RANKS * MINE],
    ),
}


@pytest.mark.parametrize(("way", "forward", "backward"), CAPACITY.values(), ids=CAPACITY.keys())
def test_collectives_of_a_layer_with_a_capacity(
    way: Way, forward: list[int], backward: list[int]
) -> None:
    """How many there are and the bytes of each; who is chosen makes no difference."""
    for skewed in (False, True):
        for rank in record(way, FACTOR, skewed):
            assert rank.forward.collectives() == forward
            assert rank.backward.collectives() == backward


@pytest.mark.parametrize("chunks", [1, 2])
def test_dropless_sends_the_counts_and_the_rows_there_are(chunks: int) -> None:
    ranks = record(Way(chunks=chunks), None)
    for rank in ranks:
        counts, *rows = rank.forward.collectives()
        assert counts == COUNTS
        assert sum(rows[:chunks]) == TOKENS * TOP_K * DIM * ITEM
        assert sorted(rank.backward.collectives()) == sorted(rows)
    for leg in (slice(1, 1 + chunks), slice(1 + chunks, None)):  # there, and back
        total = sum(sum(rank.forward.collectives()[leg]) for rank in ranks)
        assert total == RANKS * TOKENS * TOP_K * DIM * ITEM


def test_dropless_on_two_levels_sends_every_row_twice() -> None:
    ranks = record(Way("two_level", 2), None)
    for hop in range(4):
        sent = [rank.forward.collectives()[2:][hop] for rank in ranks]
        assert sum(sent) == RANKS * TOKENS * TOP_K * DIM * ITEM
    for rank in ranks:
        assert rank.forward.collectives()[:2] == [COUNTS] * 2
        assert len(rank.forward.collectives()) == 6
        assert len(rank.backward.collectives()) == 4


def test_dropless_nothing_is_sent_to_ranks_whose_experts_nobody_chose() -> None:
    """All tokens choose experts 0, 1 and 2: two ranks get no row, and send none back."""
    ranks = record(PLAIN, None, skewed=True)
    back = [rank.forward.collectives()[2] for rank in ranks]
    assert back == [2 * RANKS * TOKENS * DIM * ITEM, RANKS * TOKENS * DIM * ITEM, 0, 0]
    assert all(len(rank.backward.collectives()) == 2 for rank in ranks)
