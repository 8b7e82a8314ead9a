"""Process groups: start and end, named axes, reductions over all ranks.

World = dp_replicate × dp_shard, and expert parallelism folds into the latter: dp_shard = edp × ep.
The `ep` ranks of an expert group are adjacent and hold different experts; the `edp` ranks (one from
every expert group) hold the same ones. Where an expert group spans several nodes, consecutive ranks
of it share a node. Every rank reads its own data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moetrain.errors import UserError
from moetrain.host_memory import keep_freed

T = TypeVar("T")

BACKGROUND = "background"
"""Description of a group that is used beside the training."""


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the world size, as the launcher set them; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group():
    """Join the launcher's process group, or make one of a single rank; leave it at the end.

    The backend is NCCL with a GPU for every rank (and Gloo for CPU tensors), Gloo otherwise. Its
    collectives may take as long as ranks may be apart in reading from disks. Yields the device of
    this rank.
    """
    device, backend = _device(), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        keep_freed()
    rank, world = rank_and_world()
    alone = None if "RANK" in os.environ else dist.HashStore()
    dist.init_process_group(
        backend,
        rank=rank,
        world_size=world,
        store=alone,
        timeout=timedelta(hours=1),
    )
    try:
        yield device
    except BaseException:
        # NCCL would wait here for ranks that are inside a collective, and hide the error.
        if device.type == "cpu":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _device() -> torch.device:
    """This rank's GPU, or the CPU where torch sees none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if visible == 1:  # launchers that show every rank its own GPU, and it alone
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise UserError(
            f"LOCAL_RANK ({local_rank}) needs a GPU of its own, but only {visible} are visible; "
            "start fewer ranks per node, or set CUDA_VISIBLE_DEVICES to '' to train on the CPU"
        )
    return torch.device("cuda", local_rank)


class Mesh:
    """The named axes of a run, and the collectives over all of its ranks."""

    def __init__(self, device: torch.device, ep: int = 1, dp_replicate: int = 1, nodes: int = 1):
        """Collective: every rank of the default process group takes part.

        `nodes` is the number of nodes that an expert group spans, if one is to tell them apart.
        """
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        dp_shard = self.world // dp_replicate
        edp = dp_shard // ep
        assert dp_replicate * edp * ep == self.world, "config.check_world comes first"
        self.ep, self.edp, self.dp_replicate = ep, edp, dp_replicate
        self._dense = init_device_mesh(
            device.type, (dp_replicate, dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
        )
        self._expert = init_device_mesh(
            device.type, (dp_replicate, edp, ep), mesh_dim_names=("dp_replicate", "edp", "ep")
        )

        self._nodes = None
        if nodes > 1:
            self._nodes = init_device_mesh(
                device.type,
                (self.world // ep, nodes, ep // nodes),
                mesh_dim_names=("expert_group", "across", "inside"),
            )

    @property
    def dense(self) -> DeviceMesh:
        """What dense weights are sharded over: all data ranks; two axes with hybrid sharding."""
        return self._dense if self.dp_replicate > 1 else self._dense["dp_shard"]

    @property
    def same_experts(self) -> DeviceMesh:
        """What the weights of one expert are sharded over: the ranks that hold the same experts."""
        names = ("dp_replicate", "edp") if self.dp_replicate > 1 else ("edp",)
        return self._expert[names]

    @property
    def expert_parallel(self) -> DeviceMesh:
        """The ranks that share one set of experts."""
        return self._expert["ep"]

    @property
    def inside_node(self) -> DeviceMesh:
        """Those of them on the same node; only of a mesh of several nodes."""
        assert self._nodes is not None
        return self._nodes["inside"]

    @property
    def across_nodes(self) -> DeviceMesh:
        """One of them on every node, each at the same place; only of a mesh of several nodes."""
        assert self._nodes is not None
        return self._nodes["across"]

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank. It travels between CPUs, and waits for no GPU."""
        seen = torch.tensor(int(flag))
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return bool(seen)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in a new tensor."""
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, in one collective."""
        if tensors:
            total = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(total)
            parts = total.split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


def limit_collectives(seconds: float) -> None:
    """Give the groups there are a time limit; torch gives new ones a limit of its own."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def collectives_begun() -> int:
    """How many collectives this rank has begun so far, in all of its groups."""
    groups = list(distributed_c10d._world.pg_map)
    return sum(
        group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        for group in groups
        if group.group_desc != BACKGROUND
    )


def on_first_local_rank(work: Callable[[], T], within: timedelta = timedelta(days=1)) -> T:
    """Run repeatable, cached work on one rank of every node while the others wait, then on them.

    A UserError of any rank becomes the same UserError on all of them.
    """
    # A group of its own: the default one's time limit is that of a collective. It ends with the
    # default group, not here, because simulated ranks cannot end one group alone.
    waiting = dist.new_group(timeout=within)
    assert isinstance(waiting, dist.ProcessGroup)
    result, error = None, None
    for first in (True, False):
        if (int(os.environ.get("LOCAL_RANK", "0")) == 0) == first:
            try:
                result = work()
            except UserError as problem:
                error = str(problem)
        raise_alike(error, waiting)
    return result  # type: ignore[return-value]


def raise_alike(error: str | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise UserError on every rank where one of them has an error; a collective."""
    for message in gather(error, group):
        if message is not None:
            raise UserError(message)


def require_same(what: str, value: str, fix: str) -> None:
    """Raise UserError, on every rank, unless all ranks have the same value."""
    values = gather(value)
    other = next((rank for rank, theirs in enumerate(values) if theirs != values[0]), None)
    if other is not None:
        raise UserError(f"{what} of rank {other} is not that of rank 0; {fix}")


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank has, in rank order; anything that can be pickled. A collective."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values
