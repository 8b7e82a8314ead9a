"""Transport: rows to the experts and back, within one rank or by all-to-all.

`dispatch(x_TD, plan)` starts to send every planned row to the rank that holds its expert, and waits
for nothing; `combine` lets the experts work on what has arrived, brings the results back and sums
each token's choices, weighted by its gates, in the order of choices. Nothing is kept between the
two but the record that `dispatch` returns. AllToAll on P ranks equals Local on the concatenated
batch.

Shape suffixes: T tokens on this rank, K choices, E experts, P ranks, e = E/P experts on this rank,
R rows, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from moetrain.moe.capacity import Plan
from moetrain.moe.experts import Experts


class _Gather(torch.autograd.Function):
    """rows[r] = x[token of r]. The gradient is a gather too: no atomics, one order of summation."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        num_tokens, k = row_TK.shape
        token_R = (source_R // k).clamp(max=num_tokens - 1)
        empty_R = source_R == row_TK.numel()
        return x_TD.index_select(0, token_R).masked_fill_(empty_R[:, None], 0)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor):  # type: ignore[override]
        (row_TK,) = ctx.saved_tensors
        first_T, *other = row_TK.unbind(1)
        wide = torch.promote_types(grad_RD.dtype, torch.float32)
        grad_TD = _rows_at(grad_RD, first_T).to(wide)
        for row_T in other:
            grad_TD = grad_TD + _rows_at(grad_RD, row_T)
        return grad_TD.to(grad_RD.dtype), None, None


class _Combine(torch.autograd.Function):
    """y[t] = Σ_k gate[t, k]·rows[row[t, k]], k in order; an assignment without a row adds 0."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, gate_TK: Tensor, source_R: Tensor, row_TK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_RD, gate_TK, source_R, row_TK)
        y_TD = gate_TK[:, :1] * _rows_at(rows_RD, row_TK[:, 0])
        for choice in range(1, row_TK.shape[1]):
            gate_T1 = gate_TK[:, choice : choice + 1]
            y_TD = y_TD + gate_T1 * _rows_at(rows_RD, row_TK[:, choice])
        return y_TD.to(rows_RD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor):  # type: ignore[override]
        rows_RD, gate_TK, source_R, row_TK = ctx.saved_tensors
        k = row_TK.shape[1]
        source_R = source_R[: rows_RD.shape[0]]
        assignment_R = source_R.clamp(max=row_TK.numel() - 1)
        gate_R = gate_TK.flatten()[assignment_R].to(grad_TD.dtype)
        grad_RD = gate_R[:, None] * grad_TD.index_select(0, assignment_R // k)
        grad_RD.masked_fill_((source_R == row_TK.numel())[:, None], 0)
        grad_wide_TD = grad_TD.to(gate_TK.dtype)
        grad_gate_TK = torch.stack(
            [(grad_wide_TD * _rows_at(rows_RD, row_T)).sum(-1) for row_T in row_TK.unbind(1)], dim=1
        )
        return grad_RD, grad_gate_TK, None, None


def _rows_at(rows_RD: Tensor, row_T: Tensor) -> Tensor:
    """rows[row], and zero where the row does not exist, whatever garbage the rows hold: (T, D)."""
    num_rows = rows_RD.shape[0]
    if num_rows == 0:
        return rows_RD.new_zeros(row_T.shape[0], rows_RD.shape[1])
    absent_T = row_T >= num_rows
    return rows_RD.index_select(0, row_T.clamp(max=num_rows - 1)).masked_fill_(absent_T[:, None], 0)


class _Permute(torch.autograd.Function):
    """x[order] for a permutation; the gradient is a gather by its inverse."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return x_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor):  # type: ignore[override]
        (inverse_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, inverse_R), None, None


def gather_rows(x_TD: Tensor, plan: Plan) -> Tensor:
    """The token of every row of the plan, zeros in empty rows: (R, D)."""
    return _Gather.apply(x_TD, plan.source_R, plan.row_TK)  # type: ignore[return-value]


def combine_rows(rows_RD: Tensor, gate_TK: Tensor, plan: Plan) -> Tensor:
    """Each token's rows, weighted by its gates and summed in the gates' precision: (T, D).

    `rows_RD` may end before the plan's empty tail.
    """
    return _Combine.apply(rows_RD, gate_TK, plan.source_R, plan.row_TK)  # type: ignore[return-value]


class Arrived(NamedTuple):
    """Rows on their way to this rank's experts, and what it takes to send them back."""

    plan: Plan
    rows: Tensor
    """(e, R, D) when `counts` is None, otherwise (R, D) sorted by expert."""
    counts: list[int] | None
    """Rows of each expert on this rank, where they differ."""
    journey: Journey | None = None
    """How uneven rows came from other ranks."""


class Journey(NamedTuple):
    """An uneven all-to-all, to be undone: rows sent and received per rank, and their reordering."""

    sent: list[int]
    received: list[int]
    order_R: Tensor
    inverse_R: Tensor


class Dispatcher(Protocol):
    """Brings rows to experts and back."""

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Any:
        """Start to send the rows; what `combine` takes."""
        ...

    def combine(self, experts: Experts, arrived: Any, gate_TK: Tensor) -> Tensor:
        """Run this rank's experts on what has arrived, and bring it back to its tokens: (T, D)."""
        ...


class Local:
    """All experts are on this rank."""

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Arrived:
        """One gather."""
        rows_RD = gather_rows(x_TD, plan)
        if plan.rows_per_expert is not None:
            rows_eRD = rows_RD.view(-1, plan.rows_per_expert, rows_RD.shape[1])
            return Arrived(plan, rows_eRD, counts=None)
        counts = plan.count_E.tolist()
        return Arrived(plan, rows_RD[: sum(counts)], counts)

    def combine(self, experts: Experts, arrived: Arrived, gate_TK: Tensor) -> Tensor:
        """The experts, one gather and a weighted sum."""
        rows = experts(arrived.rows, arrived.counts)
        return combine_rows(rows.reshape(-1, rows.shape[-1]), gate_TK, arrived.plan)


class AllToAll:
    """Experts are spread over the ranks of a process group, E/P consecutive ones on each.

    With a capacity every rank sends the same number of rows to every other: static shapes, no
    host synchronisation. Dropless, the ranks first exchange how many rows they will send.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.size = group.size()

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Arrived:
        """Gather the rows by expert and send them to the experts' ranks."""
        rows_RD = gather_rows(x_TD, plan)
        if plan.rows_per_expert is None:
            return self._dispatch_uneven(rows_RD, plan)
        arrived_RD = all_to_all_single_autograd(rows_RD, None, None, self.group)
        rows_PeRD = arrived_RD.view(self.size, -1, plan.rows_per_expert, rows_RD.shape[1])
        return Arrived(plan, rows_PeRD.transpose(0, 1).flatten(1, 2), counts=None)

    def combine(self, experts: Experts, arrived: Arrived, gate_TK: Tensor) -> Tensor:
        """Run the experts, send the results back and sum them per token."""
        rows, plan = experts(arrived.rows, arrived.counts), arrived.plan
        if arrived.journey is not None:
            return combine_rows(self._return_uneven(rows, arrived.journey), gate_TK, plan)
        rows_PeRD = rows.unflatten(1, (self.size, -1)).transpose(0, 1)
        rows_RD = rows_PeRD.reshape(-1, rows.shape[-1])
        back_RD = all_to_all_single_autograd(rows_RD, None, None, self.group)
        return combine_rows(back_RD, gate_TK, plan)

    def _dispatch_uneven(self, rows_RD: Tensor, plan: Plan) -> Arrived:
        send_Pe = plan.count_E.view(self.size, -1)
        receive_Pe = torch.empty_like(send_Pe)
        dist.all_to_all_single(receive_Pe, send_Pe, group=self.group)
        # The one host synchronisation: the collective below wants its sizes as Python ints.
        sizes = torch.cat([send_Pe.sum(1), receive_Pe.sum(1), receive_Pe.sum(0)]).tolist()
        sent, received = sizes[: self.size], sizes[self.size : 2 * self.size]
        counts = sizes[2 * self.size :]
        arrived_RD = all_to_all_single_autograd(rows_RD[: sum(sent)], received, sent, self.group)
        # Rows arrive by (rank, expert); the experts want them by (expert, rank).
        expert_Pe = torch.arange(len(counts), device=rows_RD.device).repeat(self.size)
        order_R = expert_Pe.repeat_interleave(receive_Pe.flatten()).argsort(stable=True)
        journey = Journey(sent, received, order_R, order_R.argsort())
        rows = _Permute.apply(arrived_RD, journey.order_R, journey.inverse_R)
        return Arrived(plan, rows, counts, journey)  # type: ignore[arg-type]

    def _return_uneven(self, rows_RD: Tensor, journey: Journey) -> Tensor:
        by_rank_RD = _Permute.apply(rows_RD, journey.inverse_R, journey.order_R)
        return all_to_all_single_autograd(by_rank_RD, journey.sent, journey.received, self.group)  # type: ignore[arg-type]
