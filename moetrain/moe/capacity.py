"""Capacity: who gets a slot. Routing -> Plan, the row of every assignment.

Shape suffixes: T tokens on this rank, S tokens of one routing group, G groups, K choices,
E experts, C slots per expert and group, N = K·S assignments of a group, R rows of the expert
buffer, F capacity factors. An *assignment* is one (token, choice) pair; its number is t·K + k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.moe.routing import Routing, occurrences


class Plan(NamedTuple):
    """Where every assignment goes: rows of a buffer sorted by expert, and back.

    With a capacity the buffer is static, (E, G, C) flattened, and has empty rows. Dropless it
    holds the assignments sorted by expert, and what asks for no slot comes after the last expert.
    """

    row_TK: Tensor
    """int64: row of each assignment; R where it has none."""
    source_R: Tensor
    """int64: assignment in each row; T·K where the row is empty."""
    count_E: Tensor
    """int64: rows filled per expert."""
    rows_per_expert: int | None
    """G·C with a capacity; None when dropless."""
    slots: Tensor
    """int64, 0-d: slots of all experts in the groups that hold a valid token; dropless, just those
    that are filled. (Groups of padding alone are there to fill up a batch, at some layouts.)"""


@torch.compiler.assume_constant_result  # fractions cannot be traced
def capacity(group_size: int, experts: int, k: int, factor: float, min_capacity: int) -> int:
    """Slots per expert in one routing group: max(min_capacity, ⌈factor·K·S/E⌉), at most S.

    Exact: the factor counts as the decimal it was written as, so ⌈1.1·10⌉ is 11. (GShard,
    2006.16668 §3.2, with the K that DeepSpeed and Megatron-Core include.)

    Raises ValueError when the factor is not a positive finite number.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(
            f"capacity factor {factor} must be positive and finite"
            f" (group of {group_size} tokens, {experts} experts, top-{k})"
        )
    demand = Fraction(str(factor)) * k * group_size / experts
    return min(group_size, max(min_capacity, math.ceil(demand)))


class _Queues(NamedTuple):
    """The requests of every group, sorted by expert; within an expert, first served first."""

    expert_GN: Tensor  # expert of every request in sorted order; E: asks for nothing
    order_GN: Tensor  # its place in the group's (choice, token) order
    count_GE: Tensor
    start_GE: Tensor  # where the expert's queue begins in the sorted order


def _queue(routing: Routing, group_size: int, priority_TK: Tensor | None = None) -> _Queues:
    """Line up the requests: first choices of the whole group before any second choice, unless
    there are priorities; those settle ties then."""
    num_experts, expert_GN = routing.num_experts, _requests(routing, group_size)
    if priority_TK is None:
        sorted_GN, order_GN = torch.sort(expert_GN, dim=1, stable=True)
    else:
        priority_GN = _in_order(priority_TK.detach(), group_size)
        served_GN = priority_GN.sort(dim=1, descending=True, stable=True).indices
        sorted_GN, place_GN = expert_GN.gather(1, served_GN).sort(dim=1, stable=True)
        order_GN = served_GN.gather(1, place_GN)
    count_GE = occurrences(expert_GN, num_experts)
    return _Queues(sorted_GN, order_GN, count_GE, count_GE.cumsum(1) - count_GE)


def _requests(routing: Routing, group_size: int) -> Tensor:
    """The expert that each assignment of a group asks for a slot; E where it asks for none."""
    asks_TK = routing.sampled_TK & routing.asks_TK
    return _in_order(torch.where(asks_TK, routing.expert_TK, routing.num_experts), group_size)


def _in_order(values_TK: Tensor, group_size: int) -> Tensor:
    """Values of assignments in their group's (choice, token) order: (G, N)."""
    values_GSK = values_TK.view(-1, group_size, values_TK.shape[1])
    return values_GSK.transpose(1, 2).flatten(1)


def _assignment(order: Tensor, group_size: int, k: int) -> Tensor:
    """Numbers of assignments from places in their group's (choice, token) order, (G, ...)."""
    group = torch.arange(order.shape[0], device=order.device)
    token = group.view(-1, *[1] * (order.dim() - 1)) * group_size + order % group_size
    return token * k + order // group_size


def _rows_of_assignments(row_GN: Tensor, queues: _Queues, group_size: int, k: int) -> Tensor:
    """Bring the rows of sorted requests back into (T, K) order."""
    row_in_order_GN = torch.empty_like(row_GN).scatter_(1, queues.order_GN, row_GN)
    return row_in_order_GN.view(-1, k, group_size).transpose(1, 2).reshape(-1, k)


def plan_capacity(
    routing: Routing, group_size: int, slots: int, priority_TK: Tensor | None = None
) -> Plan:
    """Give each expert at most `slots` assignments of each group; the last in line lose.

    The line is that of choice ranks, then tokens (GShard Algorithm 1); with `priority_TK` (any
    dtype), the highest priority comes first and that order settles ties. T must be a multiple of
    `group_size`.
    """
    queues = _queue(routing, group_size, priority_TK)
    num_groups, num_experts = queues.count_GE.shape
    k = routing.expert_TK.shape[1]
    num_rows = num_experts * num_groups * slots
    device = routing.expert_TK.device

    slot_C = torch.arange(slots, device=device)
    filled_GEC = slot_C < queues.count_GE[:, :, None]
    place_GEC = (queues.start_GE[:, :, None] + slot_C).clamp(max=k * group_size - 1)
    order_GEC = queues.order_GN.gather(1, place_GEC.flatten(1)).view_as(place_GEC)
    assignment_GEC = _assignment(order_GEC, group_size, k)
    source_GEC = torch.where(filled_GEC, assignment_GEC, routing.expert_TK.numel())

    asks_GN = queues.expert_GN < num_experts
    expert_GN = queues.expert_GN.clamp(max=num_experts - 1)
    place_N = torch.arange(k * group_size, device=device)
    slot_GN = place_N - queues.start_GE.gather(1, expert_GN)
    group_G1 = torch.arange(num_groups, device=device)[:, None]
    row_GN = (expert_GN * num_groups + group_G1) * slots + slot_GN
    row_GN = torch.where(asks_GN & (slot_GN < slots), row_GN, num_rows)
    return Plan(
        row_TK=_rows_of_assignments(row_GN, queues, group_size, k),
        source_R=source_GEC.transpose(0, 1).flatten(),
        count_E=queues.count_GE.clamp(max=slots).sum(0),
        rows_per_expert=num_groups * slots,
        slots=num_experts * slots * routing.valid_T.view(-1, group_size).any(1).sum(),
    )


def would_drop(routing: Routing, group_size: int, slots: Sequence[int]) -> Tensor:
    """Assignments that each of F numbers of slots per expert and group would drop: int64 (F,).

    An expert turns away what it is asked for beyond its slots, whoever that is: so this is exact
    for every order in which requests are served, but not where losers go on to other experts.
    """
    count_GE = occurrences(_requests(routing, group_size), routing.num_experts)
    # Filled on the device: a tensor made of a list would be waited for.
    slots_F1 = torch.stack([count_GE.new_full((1,), each) for each in slots])
    return (count_GE.flatten() - slots_F1).clamp(min=0).sum(1)


def plan_dropless(routing: Routing) -> Plan:
    """Every assignment that asks for an expert gets a row; rows are sorted by expert."""
    num_tokens, k = routing.expert_TK.shape
    queues = _queue(routing, num_tokens)
    num_experts, num_rows = queues.count_GE.shape[1], num_tokens * k
    asks_GN = queues.expert_GN < num_experts
    row_GN = torch.where(asks_GN, torch.arange(num_rows, device=asks_GN.device), num_rows)
    source_GN = _assignment(queues.order_GN, num_tokens, k)
    return Plan(
        row_TK=_rows_of_assignments(row_GN, queues, num_tokens, k),
        source_R=torch.where(asks_GN, source_GN, num_rows).flatten(),
        count_E=queues.count_GE[0],
        rows_per_expert=None,
        slots=queues.count_GE.sum(),
    )
