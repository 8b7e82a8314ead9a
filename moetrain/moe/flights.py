"""Collectives of rows that are started first and waited for later, with gradients that do the same.

What is computed between the start and `land` overlaps with the transport. So does, in the backward
pass, what autograd computes between their gradients: that of landing starts the opposite
all-to-all, that of starting waits for it. The collectives are functional ones, which torch.compile
can trace.

Shape suffixes: T rows of this rank, P ranks, R rows, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # defines the operators
from torch import Tensor

_ops = torch.ops._c10d_functional


class Flight(NamedTuple):
    """Rows under way."""

    rows: Tensor
    """Not to be read before they have landed."""
    way_back: Tensor
    """Zeros without memory of their own, shaped as the gradient that will come back: it need not
    have as many rows as have been sent."""
    group: str
    """The process group's name."""
    sent: list[int]
    """Rows to each rank of the group."""
    received: list[int]


def all_to_all(rows_RD: Tensor, group: str, sent: list[int], received: list[int]) -> Flight:
    """Start to send consecutive rows to each rank: `sent[i]` to the i-th, `received[i]` from it."""
    return Flight(*_AllToAll.apply(rows_RD, group, sent, received), group, sent, received)  # type: ignore[misc]


def all_gather(x_TD: Tensor, group: dist.ProcessGroup) -> Flight:
    """Start to send all rows to all ranks, which have as many: (P·T, D) will land, rank by rank.

    The gradients that come back are summed in the order of ranks, in fp32 at least.
    """
    name, rows = group.group_name, [len(x_TD)] * group.size()
    return Flight(*_AllGather.apply(x_TD, name, group.size()), name, rows, rows)  # type: ignore[misc]


def land(flight: Flight) -> Tensor:
    """Wait for rows that are under way."""
    return _Land.apply(*flight)  # type: ignore[return-value]


def add_up(share_RD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send every rank its rows, and sum what comes from all ranks: (P·T, D) to (T, D).

    A reduce-scatter that adds in the same order every time.
    """
    rows = [len(share_RD) // group.size()] * group.size()
    landed_RD = land(all_to_all(share_RD, group=group.group_name, sent=rows, received=rows))
    return landed_RD.unflatten(0, (group.size(), -1)).sum(0)


def swap(block_PX: Tensor, group: dist.ProcessGroup) -> Tensor:
    """One block for every rank, against one from each; without a gradient."""
    each = [1] * group.size()
    return land(all_to_all(block_PX, group=group.group_name, sent=each, received=each))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, group: str, sent: list[int], received: list[int]):
        flight_RD = _ops.all_to_all_single(rows_RD.contiguous(), received, sent, group)
        ctx.mark_non_differentiable(flight_RD)
        return flight_RD, rows_RD.new_zeros(()).expand_as(rows_RD)

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad_RD: Tensor):  # type: ignore[override]
        return _ops.wait_tensor(grad_RD), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, group: str, size: int):
        flight_RD = _ops.all_gather_into_tensor(x_TD.contiguous(), size, group)
        ctx.mark_non_differentiable(flight_RD)
        ctx.size = size
        return flight_RD, x_TD.new_zeros(()).expand_as(flight_RD)

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad_RD: Tensor):  # type: ignore[override]
        grad_PTD = _ops.wait_tensor(grad_RD).unflatten(0, (ctx.size, -1))
        wide = torch.promote_types(grad_RD.dtype, torch.float32)
        return grad_PTD.sum(0, dtype=wide).to(grad_RD.dtype), None, None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        flight_RD: Tensor,
        way_back_RD: Tensor,
        group: str,
        sent: list[int],
        received: list[int],
    ):
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _ops.wait_tensor(flight_RD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor):  # type: ignore[override]
        grad_RD = grad_RD.contiguous()
        back_RD = _ops.all_to_all_single(grad_RD, ctx.sent, ctx.received, ctx.group)
        return None, back_RD, None, None, None
