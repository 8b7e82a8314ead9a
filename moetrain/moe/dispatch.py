"""Dispatchers: they bring rows to the experts and back.

`dispatch(x_TD, plan)` starts to send every planned row to the rank that holds its expert;
`combine` lets the experts work on what has arrived, brings the results back and sums each token's
choices, weighted by its gates. Nothing is kept between the two but the record that `dispatch`
returns. Every dispatcher on P ranks equals Local on the concatenated batch.

Shape suffixes: T tokens on this rank, K choices, E experts, P ranks, e = E/P experts on this rank,
n parts, m = e/n experts of one part, R rows, F filled ones, N = T·K assignments, D model width, X
anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.capacity import Plan
from moetrain.moe.exchange import (
    Route,
    change,
    change_back,
    even_route,
    head_back,
    number_of_ranks,
    order_of_ranks,
    set_out,
    uneven_routes,
)
from moetrain.moe.experts import Experts, Feed
from moetrain.moe.flights import Flight, add_up, all_gather, land
from moetrain.moe.packed import run_packed
from moetrain.moe.rows import (
    Turn,
    are_filled,
    combine_rows,
    gather_rows,
    reorder_experts,
    turn_rows,
)


class Dispatcher(Protocol):
    """Brings rows to experts and back."""

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Any:
        """Start to send the rows, as far as one can without waiting; returns what `combine` needs.

        What is computed before `combine` is called overlaps with the transport.
        """
        ...

    def combine(self, experts: Experts, arrived: Any, gate_TK: Tensor) -> Tensor:
        """Run this rank's experts on what has arrived, and bring it back to its tokens: (T, D)."""
        ...


class Arrived(NamedTuple):
    """Rows at their experts."""

    plan: Plan
    rows: Tensor
    """(e, R, D) when `counts` is None, otherwise (R, D) sorted by expert."""
    counts: list[int] | None
    """Rows of each expert on this rank, where they differ."""


class Local:
    """All experts are on this rank."""

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Arrived:
        """One gather."""
        rows_RD = gather_rows(x_TD, plan)
        if plan.rows_per_expert is not None:
            rows_eRD = rows_RD.unflatten(0, (-1, plan.rows_per_expert))
            return Arrived(plan, rows_eRD, counts=None)
        counts = plan.count_E.tolist()
        return Arrived(plan, rows_RD[: sum(counts)], counts)

    def combine(self, experts: Experts, arrived: Arrived, gate_TK: Tensor) -> Tensor:
        """The experts, one gather and a weighted sum."""
        rows = experts(arrived.rows, arrived.counts)
        return combine_rows(rows.reshape(-1, rows.shape[-1]), gate_TK, arrived.plan)


class Waiting(NamedTuple):
    """Tokens, where they are, and the rows they are to be."""

    x_TD: Tensor
    plan: Plan


@final
class Packed:
    """All experts are on this rank, which is a CPU: see `moetrain.moe.packed`."""

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Waiting:
        """Nothing moves yet."""
        return Waiting(x_TD, plan)

    def combine(self, experts: Experts, arrived: Waiting, gate_TK: Tensor) -> Tensor:
        """Gather, multiply and sum, a few experts at a time."""
        return run_packed(arrived.x_TD, gate_TK, *experts.local_weights(), arrived.plan)


class Flights(NamedTuple):
    """Rows on the last hop to their experts, part by part."""

    plan: Plan
    """As the rows were gathered: by part, then by rank, then by expert."""
    routes: list[Route]
    flights: list[Flight]


@final
class AllToAll:
    """Experts are spread over P ranks, E/P consecutive ones on each; rows travel by all-to-all.

    `group` holds the P ranks. With `across`, it holds those of one node, `across` those with the
    same place in every node, and rows take two hops. (Ranks of a node are consecutive.)

    The experts of every rank are cut into `chunks` consecutive parts: while one part's experts
    compute, the next part's rows arrive and the last one's results return.

    With a capacity every rank sends the same number of rows to every other: static shapes, no
    host synchronisation. Dropless, the ranks first exchange how many rows they will send, for all
    parts at once.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        across: dist.ProcessGroup | None = None,
        chunks: int = 1,
    ):
        self.groups = [group] if across is None else [group, across]
        self.num_ranks = number_of_ranks(self.groups)
        self.chunks = chunks

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Flights:
        """Gather the rows by part and rank, send them off, and see them to their last hop."""
        shape = (self.chunks, self.num_ranks, -1)
        if self.chunks > 1 or len(self.groups) > 1:
            plan = reorder_experts(plan, self._order(plan))
        rows_RD = gather_rows(x_TD, plan)
        if plan.rows_per_expert is None:
            routes = uneven_routes(self.groups, plan.count_E.view(shape))
        else:
            num_experts = plan.count_E.view(shape).shape[2]
            route = even_route(self.groups, num_experts, plan.rows_per_expert)
            routes = [route] * self.chunks
        parts = _cut(rows_RD, [sum(route.hops[0].sent) for route in routes])
        flights = [set_out(*part) for part in zip(parts, routes, strict=True)]
        flights = [change(*part) for part in zip(flights, routes, strict=True)]
        return Flights(plan, routes, flights)

    def combine(self, experts: Experts, arrived: Flights, gate_TK: Tensor) -> Tensor:
        """Run the experts and start their results' way back part by part; then sum per token."""
        plan, routes, flights = arrived
        returning = []
        for feed, route, flight in zip(experts.split(self.chunks), routes, flights, strict=True):
            results_RD = _run(feed, land(flight), route.hops[-1].turn, route.counts)
            returning.append(head_back(results_RD, route))
        returning = [change_back(*part) for part in zip(returning, routes, strict=True)]
        parts = [land(flight) for flight in returning]
        return combine_rows(parts[0] if len(parts) == 1 else torch.cat(parts), gate_TK, plan)

    def _order(self, plan: Plan) -> Tensor:
        """The experts by part, then by rank in the order of sending."""
        expert_Pnm = torch.arange(plan.count_E.numel(), device=plan.count_E.device)
        expert_Pnm = expert_Pnm.view(self.num_ranks, self.chunks, -1)
        rank_P = order_of_ranks(self.groups, expert_Pnm.device)
        return expert_Pnm[rank_P].transpose(0, 1).flatten()


def _cut(rows_RD: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """The rows in parts, without the empty tail that a dropless plan may have."""
    tail = len(rows_RD) - sum(sizes)
    return [rows_RD] if sizes == [len(rows_RD)] else rows_RD.split([*sizes, tail])[:-1]


def _run(feed: Feed, rows_RD: Tensor, turn: Turn, counts: list[int] | None) -> Tensor:
    """What experts make of rows that lie by rank, then by expert: (R, D), in the same order.

    Where they have no counts, each has as many, of which some are empty. A GPU multiplies these,
    too; a CPU leaves them out, unless rows bring keys, which changes nothing: experts have no bias,
    so rows of zeros become rows of zeros, and add nothing to any gradient.
    """
    num_experts = turn.shape[1]
    if feed.takes_any_order(rows_RD):
        row_F = turn.order_of(len(rows_RD))
        if counts is None:
            is_filled_R = are_filled(rows_RD)[row_F]
            row_F = row_F[is_filled_R]
            counts = is_filled_R.view(num_experts, -1).sum(1).tolist()
        return feed.in_place(rows_RD, row_F, counts)
    rows_RD = turn_rows(rows_RD, turn)
    if counts is None:
        results_RD = feed(rows_RD.unflatten(0, (num_experts, -1)), None).flatten(0, 1)
    else:
        results_RD = feed(rows_RD, counts)
    return turn_rows(results_RD, turn.back())


class Gathered(NamedTuple):
    """Tokens on their way to every rank, and what their rank planned for them."""

    plan: Plan
    x: Flight
    table: Flight
    """Of every rank: the row of each assignment, and the rows of each expert."""


@final
class AllGather:
    """Every rank gets all tokens of the group, and runs its own experts on those that chose them.

    Then the ranks send each other their shares of every token's sum, in the precision of the gates,
    which the token's rank adds up in the order of ranks (and not of choices, as elsewhere). Every
    rank must bring the same number of tokens, dropless, too.

    What travels does not depend on K or the capacity factor: P - 1 rows for every token, and as
    many shares back. All-to-all sends up to K·(capacity factor) rows, so this is the cheaper one
    where K is large and the group is small.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Gathered:
        """Start to send this rank's tokens to everybody, and the rows planned for them."""
        table = torch.cat([plan.row_TK.flatten(), plan.count_E])[None]
        x_RD, table_PX = (all_gather(t, group=self.group) for t in (x_TD, table))
        return Gathered(plan, x_RD, table_PX)

    def combine(self, experts: Experts, arrived: Gathered, gate_TK: Tensor) -> Tensor:
        """Run the experts on the tokens of all ranks, and add up what all ranks have for ours."""
        gates = all_gather(gate_TK, group=self.group)
        table_PX = land(arrived.table)
        plan, counts = _share(arrived.plan, table_PX, self.group.rank())
        rows_RD = gather_rows(land(arrived.x), plan)
        unturned = Turn((1, plan.count_E.numel()))
        results_RD = _run(experts.feed(), rows_RD, unturned, counts)
        gates = land(gates)
        shares = combine_rows(results_RD, gates, plan, dtype=gates.dtype)
        return add_up(shares, self.group).to(rows_RD.dtype)


def _share(plan: Plan, table_PX: Tensor, rank: int) -> tuple[Plan, list[int] | None]:
    """One rank's part of the plans of all: where the tokens of the group go among its experts.

    `table_PX` holds every rank's rows and counts. Rows come in the order in which an all-to-all
    would bring them. Dropless, also how many there are for each expert.
    """
    (num_tokens, k), num_experts = plan.row_TK.shape, plan.count_E.numel()
    row_PN, count_PE = table_PX.split([num_tokens * k, num_experts], 1)
    if plan.rows_per_expert is not None:
        count_PE = torch.full_like(count_PE, plan.rows_per_expert)
    end_PE, held = count_PE.cumsum(1), num_experts // len(table_PX)
    mine = slice(rank * held, (rank + 1) * held)
    count_Pe = count_PE[:, mine]
    start_eP = count_Pe.T.flatten().cumsum(0).view(held, -1) - count_Pe.T
    shift_Pe = start_eP.T - (end_PE[:, mine] - count_Pe)
    # past the last expert where there is no row
    place_PN = torch.searchsorted(end_PE, row_PN.contiguous(), right=True) - mine.start
    is_mine_PN = (place_PN >= 0) & (place_PN < held)
    moved_PN = row_PN + shift_Pe.gather(1, place_PN.clamp(0, held - 1))
    if plan.rows_per_expert is None:
        counts = count_Pe.sum(0).tolist()  # the one host synchronisation
        num_rows, rows_per_expert = sum(counts), None
    else:
        counts, rows_per_expert = None, len(table_PX) * plan.rows_per_expert
        num_rows = held * rows_per_expert
    row_PN = torch.where(is_mine_PN, moved_PN, num_rows)
    assignment_N = torch.arange(row_PN.numel(), device=row_PN.device)
    source_R = torch.full((num_rows + 1,), row_PN.numel(), device=row_PN.device)
    source_R = source_R.scatter_(0, row_PN.flatten(), assignment_N)[:-1]
    share = Plan(row_PN.view(-1, k), source_R, count_Pe.sum(0), rows_per_expert, plan.slots)
    return share, counts
