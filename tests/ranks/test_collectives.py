"""Every collective of an optimizer step: as many, as large and among the ranks that `traffic` says,
and no others."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, NamedTuple

import parity
import pytest
import torch
import torch.distributed as dist
from collectives import Collective, recorded
from layouts import BATCH, LENGTH, VOCAB, Case, Layout, Text, pick, spread

from moetrain.build import build_model
from moetrain.config import Config
from moetrain.mesh import Mesh
from moetrain.objective import reduce
from moetrain.step import Position, train_step
from moetrain.testing import RankPool
from moetrain.traffic import traffic

# ---- the recorder --------------------------------------------------------------------------------

_ops = torch.ops._c10d_functional


def planted() -> dict[str, list[Collective]]:
    """One collective of every kind that this code base, FSDP2 and DeepSpeed can start, each by
    itself; among ranks 0 and 1, with messages of 16 bytes."""
    group, name = dist.new_group([0, 1]), ""
    assert isinstance(group, dist.ProcessGroup)
    name, rank = group.group_name, dist.get_rank()
    ours, halves = torch.ones(4), [torch.ones(2), torch.ones(2)]
    starts = {
        "all_reduce": lambda: dist.all_reduce(ours, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(torch.empty(4), halves[0], group=group),
        "all_gather of a list": lambda: dist.all_gather(halves, torch.ones(2), group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(2), ours, group=group),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty(4), ours, group=group),
        "all_to_all of a list": lambda: dist.all_to_all(
            [torch.empty(2), torch.empty(2)], halves, group=group
        ),
        "functional all_reduce": lambda: _wait(_ops.all_reduce(ours, "sum", name)),
        "functional all_gather": lambda: _wait(_ops.all_gather_into_tensor(halves[0], 2, name)),
        "functional reduce_scatter": lambda: _wait(
            _ops.reduce_scatter_tensor(ours, "sum", 2, name)
        ),
        "functional all_to_all": lambda: _wait(_ops.all_to_all_single(ours, [2, 2], [2, 2], name)),
        "in a backward pass": lambda: (
            _Planted.apply(ours.clone().requires_grad_(), group).sum().backward()
        ),  # type: ignore[attr-defined]
        "broadcast_": lambda: dist.broadcast(ours, 0, group=group),
        "reduce_": lambda: dist.reduce(ours, 0, group=group),
        "barrier": lambda: dist.barrier(group=group),
        "send" if rank == 0 else "recv_": lambda: (
            dist.send(ours, 1, group=group) if rank == 0 else dist.recv(ours, 0, group=group)
        ),
    }
    found = {}
    for what, start in starts.items():
        with recorded() as seen:
            start()
        found[what] = seen
    with recorded() as seen:
        dist.all_gather_object([None, None], "two: how long, and what", group=group)
    return found | {"objects": seen}


def _wait(flight: torch.Tensor) -> torch.Tensor:
    return _ops.wait_tensor(flight)


class _Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        dist.all_reduce(grad.clone(), group=ctx.group)
        return grad, None


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_nothing_escapes_the_recorder(ranks2: RankPool) -> None:
    """`recorded` itself compares with what Gloo has counted."""
    for found in ranks2.run(planted):
        assert len(found.pop("objects")) == 2
        assert found.pop("barrier")[0][:2] == ("barrier", (0, 1))
        kinds = {"in a backward pass": "all_reduce"}
        for what, seen in found.items():
            kind = kinds.get(what) or what.removeprefix("functional ").split(" of ")[0]
            assert seen == [Collective(kind, (0, 1), 16)], what


def unseen() -> None:
    """A collective that the recorder is kept from seeing."""
    with recorded(), torch._C._DisableTorchDispatch():
        dist.all_reduce(torch.ones(4))


def test_what_the_recorder_misses_is_an_error(ranks2: RankPool) -> None:
    with pytest.raises(AssertionError, match=r"0 collectives of ranks \(0, 1\) seen, 1 took place"):
        ranks2.run(unseen)


# ---- a step --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Full(Text):
    """Without padding, so that every token takes part."""

    def _sequence(self, index: int) -> Any:
        row = super()._sequence(index)
        return row._replace(valid_BL=torch.ones_like(row.valid_BL))


class Seen(NamedTuple):
    """What one rank did in a step."""

    step: list[Collective]
    log: list[Collective]
    """Of the means that are logged."""
    axes: dict[str, tuple[int, ...]]
    """The ranks of this rank's groups."""


def steps(config: Config) -> Seen:
    """The second of two steps, which must be as the first."""
    run = parity.build_run(config, Full(documents=False))
    run = dataclasses.replace(run, engine=run.engine.engine)  # type: ignore[attr-defined]
    seen = []
    for step in range(2):
        with recorded() as of_step:
            result = train_step(run, Position(step, step * BATCH, step * BATCH * LENGTH))
        seen.append(of_step)
    assert total(seen[0]).keys() == total(seen[1]).keys()
    with recorded() as of_log:
        reduce(result.parts, result.counts, run.mesh, result.batch_balance)
    return Seen(seen[1], of_log, axes(run.mesh))


def axes(mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """By the names of `traffic`."""
    named = {
        "dp_shard": mesh._dense["dp_shard"],
        "dp_replicate": mesh._dense["dp_replicate"],
        "edp": mesh._expert["edp"],
        "ep": mesh.expert_parallel,
    }
    if mesh._nodes is not None:
        named |= {"inside node": mesh.inside_node, "across nodes": mesh.across_nodes}
    ranks = {name: axis.get_group() for name, axis in named.items()}
    found = {name: tuple(dist.get_process_group_ranks(group)) for name, group in ranks.items()}
    return found | {"world": tuple(range(mesh.world))}


Key = tuple[str, tuple[int, ...]]


def total(seen: list[Collective]) -> dict[Key, tuple[int, int]]:
    """Number and bytes by kind and ranks, without groups of one: nothing leaves their rank."""
    counts, sizes = Counter[Key](), Counter[Key]()
    for kind, ranks, num_bytes in seen:
        if len(ranks) > 1:
            counts[kind, ranks] += 1
            sizes[kind, ranks] += num_bytes
    return {key: (count, sizes[key]) for key, count in counts.items()}


def predicted(config: Config, world: int, seen: Seen) -> dict[Key, tuple[int, int]]:
    """What `traffic` says of this rank, by kind and ranks."""
    counts, sizes = Counter[Key](), Counter[Key]()
    for row in traffic(config, build_model(config, VOCAB), world):
        assert len(seen.axes[row.axis]) == row.ranks
        counts[row.kind, seen.axes[row.axis]] += row.count
        sizes[row.kind, seen.axes[row.axis]] += row.num_bytes
    return {key: (count, sizes[key]) for key, count in counts.items()}


LAYOUTS = {
    "ep2-data2": Layout(4, ep=2, dp_replicate=1, micro=4),
    "ep2-data2-twice": Layout(4, ep=2, dp_replicate=1, micro=2),
    "ep4": Layout(4, ep=4, dp_replicate=1, micro=4),
    "ep4-twice": Layout(4, ep=4, dp_replicate=1, micro=2),
    "hsdp": Layout(4, ep=2, dp_replicate=2, micro=4),
    "hsdp-twice": Layout(4, ep=1, dp_replicate=2, micro=2),
    "data4": Layout(4, ep=1, dp_replicate=1, micro=4),
}
"""Twice: two micro-batches in a step."""
TWO_LEVEL = {"dispatch": "two_level", "nodes": 2}
ALL_GATHER = {"dispatch": "all_gather"}
PLAIN, DROPLESS = pick("gshard", dropless=False), pick("topk", dropless=True)
"""The second has experts in every other block, and balances the whole batch, for which several
micro-batches are surveyed first."""
SHARED = pick("topk", dropless=False)
DROPOUT = pick("renormalized", dropless=False)
FP32 = {"precision": "fp32"}


def zero(stage: int, **engine: Any) -> dict[str, Any]:
    return {"kind": "deepspeed", "zero_stage": stage, **FP32, **engine}


def again(recompute: str) -> dict[str, Any]:
    return {"activation_checkpointing": recompute}


class Frozen(NamedTuple):
    """A case of which some weights keep their values."""

    case: Case
    parts: tuple[str, ...]

    @property
    def config(self) -> Config:
        train = self.case.config.train.model_copy(update={"freeze": self.parts})
        return self.case.config.model_copy(update={"train": train})


Trained = Case | Frozen
WAYS: dict[str, tuple[str, Trained, dict[str, Any], dict[str, Any]]] = {
    "plain": ("ep2-data2", PLAIN, {}, {}),
    "twice": ("ep2-data2-twice", PLAIN, {}, {}),
    "surveyed": ("ep2-data2-twice", DROPLESS, {}, {}),
    "ep4": ("ep4", SHARED, {}, {}),
    "hsdp": ("hsdp", SHARED, {}, {}),
    "hsdp-twice": ("hsdp-twice", PLAIN, {}, {}),
    "without-ep": ("data4", SHARED, {}, {}),
    "bf16": ("ep2-data2", SHARED, {"precision": "bf16"}, {}),
    "selective": ("ep2-data2-twice", SHARED, again("selective"), {}),
    "selective-dropless": ("ep4", DROPLESS, again("selective"), {}),
    "full": ("ep2-data2-twice", SHARED, again("full"), {}),
    "full-dropless": ("ep4-twice", DROPLESS, again("full"), {}),
    "full-hsdp": ("hsdp", PLAIN, again("full"), {}),
    "chunks": ("ep2-data2", PLAIN, {}, {"overlap_chunks": 2}),
    "chunks-dropless": ("ep4", DROPLESS, again("full"), {"overlap_chunks": 2}),
    "two-level": ("ep4", PLAIN, {}, TWO_LEVEL),
    "two-level-dropless": ("ep4", DROPLESS, {}, {**TWO_LEVEL, "overlap_chunks": 2}),
    "all-gather": ("ep4", SHARED, again("full"), ALL_GATHER),
    "all-gather-dropless": ("ep2-data2-twice", DROPLESS, again("selective"), ALL_GATHER),
    "all-gather-bf16": ("ep4", PLAIN, {"precision": "bf16"}, ALL_GATHER),
    "all-gather-hash": ("ep4", pick("hash", dropless=True), {}, ALL_GATHER),
    "all-gather-expert-choice": ("ep4", pick("expert_choice", group=4), {}, ALL_GATHER),
    "sigmoid": ("ep4", pick("sigmoid", dropless=False), {}, {}),
    "noisy-topk": ("ep4-twice", pick("noisy_topk", dropless=True), {}, {}),
    "hierarchical": ("ep2-data2", pick("hierarchical", dropless=False), {}, {}),
    "dropout": ("ep4", DROPOUT, {}, {}),
    "dropout-all-gather": ("ep2-data2", DROPOUT, again("full"), ALL_GATHER),
    "frozen": ("hsdp", Frozen(pick("sigmoid", dropless=False), ("experts", "router")), {}, {}),
    "zero1-frozen": ("ep2-data2", Frozen(SHARED, ("experts",)), zero(1), {}),
    "zero0": ("ep2-data2-twice", PLAIN, zero(0), {}),
    "zero1": ("ep2-data2-twice", SHARED, zero(1), {}),
    "zero2": ("ep2-data2", PLAIN, zero(2), {}),
    "zero2-twice": ("ep2-data2-twice", DROPLESS, zero(2, precision="bf16"), {}),
    "zero1-full": ("ep4", SHARED, zero(1, **again("full")), TWO_LEVEL),
    "zero2-without-ep": ("data4", PLAIN, zero(2), {}),
}
"""Layout, what is trained, engine and transport."""


def made(layout: str, case: Trained, engine: dict[str, Any], parallel: dict[str, Any]) -> Config:
    """All settings of a way."""
    sections = case.config.model_dump()
    sections["engine"].update(engine)
    sections = spread(Config.model_validate(sections), LAYOUTS[layout]).model_dump()
    sections["parallel"].update(parallel)
    return Config.model_validate(sections)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_what_the_formulas_say(ranks4: RankPool, way: str) -> None:
    """In number on every rank; in bytes, too, unless experts have rows as they come: then all ranks
    together send what they would send if they were even."""
    config = made(*WAYS[way])
    found = ranks4.run(steps, config)
    expected = [predicted(config, 4, seen) for seen in found]
    recorded_by = [total(seen.step) for seen in found]
    if config.moe.capacity_factor is None:
        recorded_by, expected = together(recorded_by), together(expected)
    assert recorded_by == expected


def test_choices_that_are_not_sampled_do_not_travel(ranks4: RankPool) -> None:
    config = made("ep4", pick("gshard", dropless=True), {}, {})
    assert config.moe.random_second
    found = ranks4.run(steps, config)
    sent, counted = together([total(seen.step) for seen in found])[0], Counter[str]()
    for seen in found:
        for (kind, _), (_, num_bytes) in predicted(config, 4, seen).items():
            counted[kind] += num_bytes
    assert counted["all_to_all"] / 2 < sent["all_to_all"] < counted["all_to_all"]
    del sent["all_to_all"], counted["all_to_all"]
    assert sent == counted


def together(ranks: list[dict[Key, tuple[int, int]]]) -> list[Any]:
    """The numbers of all ranks, and the bytes of every kind on all of them."""
    sizes = Counter[str]()
    for found in ranks:
        for (kind, _), (_, num_bytes) in found.items():
            sizes[kind] += num_bytes
    return [sizes, *({key: count for key, (count, _) in found.items()} for found in ranks)]


def test_logging_a_step_takes_two_more(ranks4: RankPool) -> None:
    for seen in ranks4.run(steps, made(*WAYS["plain"])):
        assert [(kind, ranks) for kind, ranks, _ in seen.log] == [("all_reduce", (0, 1, 2, 3))] * 2


# ---- their order ---------------------------------------------------------------------------------

FORWARD = [
    *("root", "block", "experts", "block"),  # the first block, and what it asks for
    *("rows", "rows", "experts", "rows", "rows"),
]
BACKWARD = [
    *("block", "experts", "block"),  # the last block, its experts, and the block before it
    *("rows", "rows", "reduce experts", "reduce block"),
    *("experts", "rows", "rows", "reduce experts", "reduce block", "reduce root"),
]


def test_one_unit_is_gathered_ahead_in_either_pass(ranks4: RankPool) -> None:
    """Weights arrive while what comes before them computes: the second block's before the first
    one's rows travel, in the backward pass the first block's before the second one's rows do."""
    for seen in ranks4.run(steps, made(*WAYS["plain"])):
        statistics, *rest = [name_of(each, seen) for each in seen.step]
        assert (statistics, *rest[-2:]) == ("statistics",) * 3
        assert rest[:-2] == FORWARD + BACKWARD


def name_of(collective: Collective, seen: Seen) -> str:
    kind, ranks, num_bytes = collective
    if kind in ("all_reduce", "all_to_all"):
        return {"all_reduce": "statistics", "all_to_all": "rows"}[kind]
    name = "experts"
    if ranks == seen.axes["dp_shard"]:
        root = next(each.num_bytes for each in seen.step if each.kind == "all_gather")
        name = "root" if num_bytes == root else "block"
    return name if kind == "all_gather" else f"reduce {name}"
