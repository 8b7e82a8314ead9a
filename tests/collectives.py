"""What ranks say to each other: every collective, with its group and its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collective(NamedTuple):
    """One collective of one rank."""

    kind: str
    ranks: tuple[int, ...]
    """Of its group."""
    num_bytes: int
    """Of its message, as `moetrain.traffic.Traffic` counts them."""


KINDS = {
    "all_reduce": "allreduce_ allreduce_coalesced_ all_reduce all_reduce_",
    "all_gather": "_allgather_base_ allgather_ all_gather_into_tensor",
    "reduce_scatter": "_reduce_scatter_base_ reduce_scatter_ reduce_scatter_tensor",
    "all_to_all": "alltoall_base_ alltoall_ all_to_all_single",
}
"""Operators of torch, in the words of the formulas; others keep their own name."""
KIND_OF = {operator: kind for kind, operators in KINDS.items() for operator in operators.split()}
NAMESPACES = ("c10d", "_c10d_functional")
LOCAL = ("wait_tensor",)
"""Operators of these namespaces that send nothing."""


class Recorder(TorchDispatchMode):
    """Notes the operators by which torch starts collectives, in backward passes, too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note it if it is a collective."""
        result, name = func(*args, **(kwargs or {})), func._opname
        if func.namespace in NAMESPACES and name not in LOCAL:
            given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
            kind = KIND_OF.get(name, name)
            self.seen.append(Collective(kind, _ranks(given), _message(kind, given, result)))
        return result


def _ranks(given: dict[str, Any]) -> tuple[int, ...]:
    group = given.get("group_name")
    if "process_group" in given:
        group = dist.ProcessGroup.unbox(given["process_group"])
    elif isinstance(group, str):
        group = dist.distributed_c10d._resolve_process_group(group)
    return tuple(dist.get_process_group_ranks(group))


INPUTS = ("input", "inputs", "input_tensor", "input_tensors")


def _message(kind: str, given: dict[str, Any], result: Any) -> int:
    """What goes in; of an all-gather what comes out, which is as large as all that go in."""
    if kind == "all_gather":
        out = [value for name, value in given.items() if name.startswith("output")]
        return _num_bytes(out or result)
    sent = [given[name] for name in INPUTS if name in given]
    return _num_bytes(sent or list(given.values()))


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@contextmanager
def recorded() -> Iterator[list[Collective]]:
    """The collectives of this rank while the context is open, in order of their start.

    Raises AssertionError where Gloo, which numbers those of every group, has counted others.
    """
    recorder, before = Recorder(), _numbers()
    with recorder:
        yield recorder.seen
    found = {ranks: count - before.get(ranks, 0) for ranks, count in _numbers().items()}
    for ranks, count in found.items():
        seen = sum(collective.ranks == ranks for collective in recorder.seen)
        assert seen == count, f"{seen} collectives of ranks {ranks} seen, {count} took place"


def _numbers() -> dict[tuple[int, ...], int]:
    """How many collectives every set of ranks has had, in all of their groups."""
    numbers: dict[tuple[int, ...], int] = {}
    for group in dist.distributed_c10d._world.pg_map:
        ranks = tuple(dist.get_process_group_ranks(group))
        count = group._get_backend(torch.device("cpu"))._get_sequence_number_for_group()
        numbers[ranks] = numbers.get(ranks, 0) + count
    return numbers
