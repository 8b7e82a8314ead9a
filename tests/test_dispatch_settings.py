"""parallel.dispatch, overlap_chunks and nodes: what is refused, what is idle, what is made."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from moetrain.cautions import cautions
from moetrain.config import Config, MoEConfig, ParallelConfig, TrainConfig
from moetrain.constraints import check_world
from moetrain.errors import UserError
from moetrain.mesh import Mesh
from moetrain.moe import AllGather, AllToAll, Gate, Local, MoE, Packed
from moetrain.parallel import connect_experts
from moetrain.settings import ranks_of_node
from moetrain.testing import simulate_ranks


def configured(experts: int = 8, **parallel) -> Config:
    return Config(
        moe=MoEConfig(experts=experts),
        parallel=ParallelConfig(**parallel),
        train=TrainConfig(micro_batch=4),
    )


REFUSED = {
    "chunks that do not divide": (
        {"experts": 24, "ep": 2, "overlap_chunks": 8},
        "parallel.overlap_chunks (8) must divide the experts of a rank (12 = moe.experts 24 / "
        "parallel.ep 2); try 2, 3, 4, 6 or 12",
    ),
    "more chunks than experts": (
        {"ep": 8, "overlap_chunks": 2},
        "parallel.overlap_chunks (2) must divide the experts of a rank (1 = moe.experts 8 / "
        "parallel.ep 8); try 1",
    ),
    "chunks of an all-gather": (
        {"ep": 2, "overlap_chunks": 2, "dispatch": "all_gather"},
        "parallel.overlap_chunks (2) must be 1 for parallel.dispatch all_gather, which sends all "
        "tokens at once; set it to 1, or parallel.dispatch to all_to_all",
    ),
    "two levels on one node": (
        {"ep": 8, "dispatch": "two_level"},
        "parallel.nodes (1) must divide parallel.ep (8) and be at least 2 for parallel.dispatch "
        "two_level; try 2, 4 or 8, or parallel.dispatch all_to_all",
    ),
    "nodes that do not divide": (
        {"ep": 8, "dispatch": "two_level", "nodes": 3},
        "parallel.nodes (3) must divide parallel.ep (8) and be at least 2 for parallel.dispatch "
        "two_level; try 2, 4 or 8, or parallel.dispatch all_to_all",
    ),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_dispatch_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValidationError) as refusal:
        configured(**values)
    (problem,) = refusal.value.errors()
    assert problem["msg"] == f"Value error, {message}"


IDLE = {
    "nodes": (
        {"ep": 4, "nodes": 2},
        "parallel.nodes (2) has no effect with parallel.dispatch all_to_all; only two_level reads "
        "it",
    ),
    "chunks without expert parallelism": (
        {"overlap_chunks": 3},
        "parallel.overlap_chunks (3) has no effect when parallel.ep is 1: tokens stay where they "
        "are",
    ),
    "dispatch without expert parallelism": (
        {"dispatch": "two_level"},
        "parallel.dispatch (two_level) has no effect when parallel.ep is 1: tokens stay where they "
        "are",
    ),
    "nobody inside a node": (
        {"ep": 4, "dispatch": "two_level", "nodes": 4},
        "parallel.nodes (4) puts every rank that shares experts on a node of its own, so "
        "parallel.dispatch two_level has nobody to meet inside a node; set parallel.dispatch to "
        "all_to_all",
    ),
}


@pytest.mark.parametrize(("values", "message"), IDLE.values(), ids=IDLE.keys())
def test_dispatch_without_effect_is_warned_of(values, message):
    assert cautions(configured(**values)) == [message]


@pytest.mark.parametrize(
    "values",
    [
        {"ep": 2, "overlap_chunks": 4},
        {"ep": 8, "dispatch": "two_level", "nodes": 2},
        {"ep": 4, "dispatch": "two_level", "nodes": 2, "overlap_chunks": 2},
        {"ep": 4, "dispatch": "all_gather"},
    ],
)
def test_dispatch_with_effect_is_not_warned_of(values):
    assert cautions(configured(**values)) == []


@pytest.mark.parametrize(("ranks", "fits"), [(1, False), (2, False), (4, True), (6, False)])
def test_an_expert_group_must_fill_its_nodes_evenly(ranks, fits):
    """Two nodes of an expert group of 8 have 4 ranks each."""
    config = configured(ep=8, dispatch="two_level", nodes=2)
    check_world(config, 8)
    if fits:
        check_world(config, 8, ranks)
        return
    with pytest.raises(UserError) as refusal:
        check_world(config, 8, ranks)
    assert str(refusal.value).startswith(
        "parallel.nodes (2) puts 4 = parallel.ep 8 / 2 ranks that share experts on each node, "
        f"which must divide the ranks of a node ({ranks}); try parallel.nodes "
    )


def test_other_dispatchers_do_not_ask_for_nodes():
    check_world(configured(ep=8, nodes=2), 8, 3)
    check_world(configured(nodes=2, dispatch="two_level"), 8, 3)


def test_the_launcher_says_the_ranks_of_a_node(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_of_node() is None
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert ranks_of_node() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ranks_of_node() == 4


def groups(ep: int, nodes: int) -> tuple[list[int], list[int]]:
    mesh = Mesh(torch.device("cpu"), ep=ep, nodes=nodes)
    axes = (mesh.inside_node, mesh.across_nodes)
    return tuple(dist.get_process_group_ranks(axis.get_group()) for axis in axes)


def test_ranks_of_a_node_are_adjacent_inside_an_expert_group():
    """Eight ranks in two expert groups of four, on two nodes each."""
    for rank, (inside, across) in enumerate(simulate_ranks(8, groups, 4, 2)):
        first = rank // 2 * 2
        assert inside == [first, first + 1]
        assert across == [rank // 4 * 4 + rank % 2, rank // 4 * 4 + rank % 2 + 2]


def made(ep: int, nodes: int, *options) -> object:
    layer = MoE(0, 4, 4, 8, Gate("topk", 2))
    connect_experts(layer, Mesh(torch.device("cpu"), ep=ep, nodes=nodes), *options)
    return layer.dispatcher


def test_every_setting_makes_its_dispatcher():
    for dispatcher in simulate_ranks(4, made, 4, 1, "all_to_all", 2):
        assert isinstance(dispatcher, AllToAll)
        assert (dispatcher.chunks, [group.size() for group in dispatcher.groups]) == (2, [4])
    for dispatcher in simulate_ranks(8, made, 8, 2, "two_level", 1):
        assert isinstance(dispatcher, AllToAll)
        assert [group.size() for group in dispatcher.groups] == [4, 2]
    for dispatcher in simulate_ranks(2, made, 2, 1, "all_gather"):
        assert isinstance(dispatcher, AllGather)
    for dispatcher in simulate_ranks(2, made, 1, 1, "two_level", 3):
        assert isinstance(dispatcher, Packed)
    for dispatcher in simulate_ranks(2, made, 1, 1, "all_to_all", 1, True):
        assert isinstance(dispatcher, Local), "for compiled graphs"
