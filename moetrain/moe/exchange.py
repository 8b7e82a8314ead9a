"""Routes of rows between ranks: all-to-all in one hop or two.

Two hops reach a rank of another node by way of its counterpart: first inside the node, to the rank
with the target's place in its node, then across the nodes, among the ranks with that place. So
every rank sends one large message to every other node, instead of one to each of its ranks.

Shape suffixes: P ranks, A of them in the group of a hop, B = P/A, n parts, m experts of a part on
one rank, R rows, D model width, X anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe import flights
from moetrain.moe.flights import Flight
from moetrain.moe.rows import Turn, turn_rows, uneven_turn


class Hop(NamedTuple):
    """One all-to-all, and how its blocks are to be turned then."""

    group: str
    """The process group's name."""
    sent: list[int]
    """Rows to each rank of the group."""
    received: list[int]
    turn: Turn
    """Of what has landed."""


class Route(NamedTuple):
    """How the rows of one part reach their experts."""

    hops: list[Hop]
    """The last one's turn, from the order of ranks to that of experts, is left to whoever lands."""
    counts: list[int] | None
    """Rows of each expert that arrive; None where all have as many."""


def set_out(rows_RD: Tensor, route: Route) -> Flight:
    """Start the first hop."""
    return _start(rows_RD, route.hops[0])


def change(flight: Flight, route: Route) -> Flight:
    """Wait for every hop but the last, which is started."""
    for before, after in itertools.pairwise(route.hops):
        flight = _start(turn_rows(flights.land(flight), before.turn), after)
    return flight


def head_back(rows_RD: Tensor, route: Route) -> Flight:
    """Start the way back of rows that lie as they have landed: by rank, then by expert."""
    return _start_back(rows_RD, route.hops[-1])


def change_back(flight: Flight, route: Route) -> Flight:
    """Wait for every hop of the way back but the last, which is started."""
    for hop in reversed(route.hops[:-1]):
        flight = _start_back(turn_rows(flights.land(flight), hop.turn.back()), hop)
    return flight


def _start(rows_RD: Tensor, hop: Hop) -> Flight:
    return flights.all_to_all(rows_RD, hop.group, hop.sent, hop.received)


def _start_back(rows_RD: Tensor, hop: Hop) -> Flight:
    return flights.all_to_all(rows_RD, hop.group, hop.received, hop.sent)


def number_of_ranks(groups: Sequence[dist.ProcessGroup]) -> int:
    """P, of one group or of one inside a node and one across nodes."""
    return math.prod([group.size() for group in groups])


def order_of_ranks(groups: Sequence[dist.ProcessGroup], device: torch.device) -> Tensor:
    """The ranks in the order in which rows must lie to be sent to them: int64 (P,).

    With one group by rank; with two by place inside the node, then by node.
    """
    rank_P = torch.arange(number_of_ranks(groups), device=device)
    return rank_P.view(-1, groups[0].size()).T.flatten()


def even_route(groups: Sequence[dist.ProcessGroup], num_experts: int, rows: int) -> Route:
    """The route of a part of so many experts on every rank, all of which get as many rows."""
    num_ranks, hops = number_of_ranks(groups), []
    for group in groups:
        size = group.size()
        block = [num_ranks // size * num_experts * rows] * size
        hops.append(Hop(group.group_name, block, block, Turn((size, num_ranks // size))))
    hops[-1] = hops[-1]._replace(turn=Turn((num_ranks, num_experts)))
    return Route(hops, counts=None)


def uneven_routes(groups: Sequence[dist.ProcessGroup], count_nPm: Tensor) -> list[Route]:
    """The routes of n parts, where this rank has `count_nPm` rows for the m experts of each rank.

    Ranks lie as `order_of_ranks` says. Collective: ranks tell each other what they will send.
    """
    notices = _notify(groups, count_nPm)
    tables_nX = [table for notice in notices for table in (notice.sent_nA, notice.received_nA)]
    tables_nX.append(notices[-1].blocks_nAB.sum(1))
    # The one host synchronisation: the collectives that follow want their sizes as Python ints.
    rows = torch.cat(tables_nX, 1).tolist()
    widths = [table.shape[1] for table in tables_nX]
    routes = []
    for part, row in enumerate(rows):
        *sizes, counts = _cut(row, widths)
        ends = zip(notices, sizes[::2], sizes[1::2], strict=True)
        hops = [_uneven_hop(notice, part, sent, received) for notice, sent, received in ends]
        routes.append(Route(hops, counts))
    return routes


class _Notice(NamedTuple):
    """What the ranks of one hop have told each other."""

    group: str
    sent_nA: Tensor
    received_nA: Tensor
    blocks_nAB: Tensor
    """Rows in the blocks that arrive, to be turned; in the last hop by rank and expert."""


def _notify(groups: Sequence[dist.ProcessGroup], count_nPm: Tensor) -> list[_Notice]:
    """Send the counts along the hops that the rows will take."""
    num_parts, _, num_experts = count_nPm.shape
    held_BAnm, notices = count_nPm.transpose(0, 1), []
    for group in groups:
        held_ABnm = held_BAnm.reshape(group.size(), -1, num_parts, num_experts)
        got_ABnm = flights.swap(held_ABnm, group)
        sent_nA, received_nA = (counts.sum((1, 3)).T for counts in (held_ABnm, got_ABnm))
        blocks_nAB = got_ABnm.sum(3).permute(2, 0, 1)
        notices.append(_Notice(group.group_name, sent_nA, received_nA, blocks_nAB))
        held_BAnm = got_ABnm.transpose(0, 1)
    got_nPm = got_ABnm.flatten(0, 1).transpose(0, 1)
    return [*notices[:-1], notices[-1]._replace(blocks_nAB=got_nPm)]


def _cut(values: list[int], widths: list[int]) -> list[list[int]]:
    ends = list(itertools.accumulate(widths))
    return [values[end - width : end] for end, width in zip(ends, widths, strict=True)]


def _uneven_hop(notice: _Notice, part: int, sent: list[int], received: list[int]) -> Hop:
    turn = uneven_turn(notice.blocks_nAB[part], sum(received))
    return Hop(notice.group, sent, received, turn)
