"""Rows on one rank: gathered by expert, put in another order, and summed per token again.

Every gradient is a gather, too, or a copy: no atomics, one order of summation.

Shape suffixes: T tokens on this rank, K choices, N assignments that have a row, E experts, R rows,
D model width, A×B blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from moetrain.moe.capacity import Plan


class _Gather(torch.autograd.Function):
    """rows[r] = x[token of r]."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        num_tokens, k = row_TK.shape
        token_R = (source_R // k).clamp(max=num_tokens - 1)
        rows_RD = _clear_(x_TD.index_select(0, token_R), source_R == row_TK.numel())
        # torch 2.11, compiling, loses the gradient of a result that was changed in place.
        return rows_RD.view(rows_RD.shape)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor):  # type: ignore[override]
        (row_TK,) = ctx.saved_tensors
        return sum_rows(grad_RD, row_TK), None, None


class _Combine(torch.autograd.Function):
    """y[t] = Σ_k gate[t, k]·rows[row[t, k]], k in order; an assignment without a row adds 0."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        gate_TK: Tensor,
        source_R: Tensor,
        row_TK: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(rows_RD, gate_TK, source_R, row_TK)
        return weigh_rows(rows_RD, gate_TK, row_TK, dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor):  # type: ignore[override]
        rows_RD, gate_TK, source_R, row_TK = ctx.saved_tensors
        k = row_TK.shape[1]
        source_R = source_R[: rows_RD.shape[0]]
        assignment_R = source_R.clamp(max=row_TK.numel() - 1)
        gate_R = gate_TK.flatten()[assignment_R].to(grad_TD.dtype)
        grad_RD = grad_TD.index_select(0, assignment_R // k).mul_(gate_R[:, None])
        _clear_(grad_RD, source_R == row_TK.numel())
        # Not `dot_rows`: what that sums to, to the last bit, depends on where in memory a row lies.
        grad_wide_TD = grad_TD.to(gate_TK.dtype)
        grad_gate_TK = torch.stack(
            [(grad_wide_TD * _rows_at(rows_RD, row_T)).sum(-1) for row_T in row_TK.unbind(1)], dim=1
        )
        return grad_RD.to(rows_RD.dtype), grad_gate_TK, None, None, None


def weigh_rows(rows_RD: Tensor, gate_TK: Tensor, row_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """y[t] = Σ_k gate[t, k]·rows[row[t, k]], k in order, in the gates' precision: (T, D).

    Without autograd. An assignment without a row adds 0.
    """
    if is_eager_cpu(rows_RD):
        return _weigh_bags(rows_RD.to(dtype).contiguous(), gate_TK, row_TK)
    y_TD = gate_TK[:, :1] * _rows_at(rows_RD, row_TK[:, 0])
    for choice in range(1, row_TK.shape[1]):
        gate_T1 = gate_TK[:, choice : choice + 1]
        y_TD = y_TD + gate_T1 * _rows_at(rows_RD, row_TK[:, choice])
    # torch 2.11, compiling, loses the gradient of a result that `to` has handed through.
    return y_TD if y_TD.dtype == dtype else y_TD.to(dtype)


def sum_rows(rows_RD: Tensor, row_TK: Tensor) -> Tensor:
    """Σ_k rows[row[t, k]], k in order, in fp32 at least; as `weigh_rows` without gates."""
    if is_eager_cpu(rows_RD):
        bags = _Bags.of(row_TK, len(rows_RD))
        return F.embedding_bag(bags.row_N, rows_RD.contiguous(), bags.start_T, mode="sum")
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    ones_TK = torch.ones_like(row_TK, dtype=wide)
    return weigh_rows(rows_RD, ones_TK, row_TK, rows_RD.dtype)


def dot_rows(x_TD: Tensor, rows_RD: Tensor, row_TK: Tensor) -> Tensor:
    """x[t]·rows[row[t, k]], summed in fp32 at least and rounded once, on a CPU; 0 where there is no
    row: (T, K)."""
    bags = _Bags.of(row_TK, len(rows_RD))
    token_N = bags.exists_TK.nonzero()[:, 0]
    grad_of_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward
    dot_N = grad_of_weights(x_TD, rows_RD, bags.row_N, bags.start_T, token_N, mode=0)
    return dot_N.new_zeros(row_TK.shape).masked_scatter_(bags.exists_TK, dot_N)


def is_eager_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is on a CPU, has values, and nothing is compiled.

    There code may depend on values at no cost: experts go a few at a time, on filled rows. And rows
    are summed by the kernel of embedding bags: one pass over them, in fp32 and in order, in a tenth
    of the time of gathers and sums.
    """
    is_compiling = torch.compiler.is_compiling()
    return tensor.device.type == "cpu" and not is_compiling and not is_fake(tensor)


def _clear_(rows_RD: Tensor, is_empty_R: Tensor) -> Tensor:
    """Zeros in empty rows, in place."""
    if is_eager_cpu(rows_RD):
        return rows_RD.index_fill_(0, is_empty_R.nonzero().flatten(), 0)
    return rows_RD.masked_fill_(is_empty_R[:, None], 0)


class _Bags(NamedTuple):
    """Rows in the bags of their tokens, as embedding bags want them: those that exist."""

    row_N: Tensor
    start_T: Tensor
    """Where a token's bag begins."""
    exists_TK: Tensor

    @classmethod
    def of(cls, row_TK: Tensor, num_rows: int) -> Self:
        exists_TK = row_TK < num_rows
        count_T = exists_TK.sum(1)
        return cls(row_TK[exists_TK], count_T.cumsum(0) - count_T, exists_TK)


def _weigh_bags(rows_RD: Tensor, gate_TK: Tensor, row_TK: Tensor) -> Tensor:
    weight_TK = gate_TK.to(rows_RD.dtype)
    if rows_RD.dtype == torch.bfloat16:  # weights must be of the rows' type: in two parts, then
        rest_TK = (gate_TK - weight_TK).to(rows_RD.dtype)
        weight_TK, row_TK = torch.cat([weight_TK, rest_TK], 1), torch.cat([row_TK, row_TK], 1)
    row_N, start_T, exists_TK = _Bags.of(row_TK, len(rows_RD))
    weight_N = weight_TK[exists_TK]
    return F.embedding_bag(row_N, rows_RD, start_T, per_sample_weights=weight_N, mode="sum")


def _rows_at(rows_RD: Tensor, row_T: Tensor) -> Tensor:
    """rows[row], and zero where the row does not exist, whatever garbage the rows hold: (T, D)."""
    num_rows = rows_RD.shape[0]
    if num_rows == 0:
        return rows_RD.new_zeros(row_T.shape[0], rows_RD.shape[1])
    absent_T = row_T >= num_rows
    return _clear_(rows_RD.index_select(0, row_T.clamp(max=num_rows - 1)), absent_T)


def gather_rows(x_TD: Tensor, plan: Plan) -> Tensor:
    """The token of every row of the plan, zeros in empty rows: (R, D)."""
    return _Gather.apply(x_TD, plan.source_R, plan.row_TK)  # type: ignore[return-value]


def combine_rows(
    rows_RD: Tensor, gate_TK: Tensor, plan: Plan, dtype: torch.dtype | None = None
) -> Tensor:
    """Each token's rows, weighted by its gates and summed in the gates' precision: (T, D).

    `rows_RD` may end before the plan's empty tail. The result has their dtype unless one is given.
    """
    dtype = dtype or rows_RD.dtype
    return _Combine.apply(rows_RD, gate_TK, plan.source_R, plan.row_TK, dtype)  # type: ignore[return-value]


def reorder_experts(plan: Plan, order_E: Tensor) -> Plan:
    """The same plan with the rows of its experts in another order: those of `order_E[0]` first."""
    rows_E = plan.count_E
    if plan.rows_per_expert is not None:
        rows_E = torch.full_like(rows_E, plan.rows_per_expert)
    end_E = rows_E.cumsum(0)
    ordered_E = rows_E[order_E]
    start_E = torch.empty_like(end_E).scatter_(0, order_E, ordered_E.cumsum(0) - ordered_E)
    # Rows past the last expert, empty ones, stay where they are.
    shift_E1 = F.pad(start_E - (end_E - rows_E), (0, 1))
    row_R = torch.arange(plan.source_R.numel(), device=end_E.device)
    moved_R = row_R + shift_E1[torch.bucketize(row_R, end_E, right=True)]
    return plan._replace(
        row_TK=F.pad(moved_R, (0, 1), value=row_R.numel())[plan.row_TK],
        source_R=torch.empty_like(plan.source_R).scatter_(0, moved_R, plan.source_R),
        count_E=plan.count_E[order_E],
    )


def are_filled(rows_RD: Tensor) -> Tensor:
    """Whether each row holds anything but zeros: (R,), bool. (-0 may count as something.)"""
    if rows_RD.shape[1] * rows_RD.element_size() % 8 == 0:
        rows_RD = rows_RD.contiguous().view(torch.int64)  # several numbers at a time
    return rows_RD.any(1)


class Turn(NamedTuple):
    """Rows in A × B blocks, to be put in the order of B × A blocks."""

    shape: tuple[int, int]
    order_R: Tensor | None = None
    """int64: what comes in each place; None where all blocks have the same number of rows."""
    inverse_R: Tensor | None = None

    def back(self) -> Turn:
        """The turn that undoes this one."""
        return Turn((self.shape[1], self.shape[0]), self.inverse_R, self.order_R)

    def order_of(self, num_rows: int) -> Tensor:
        """Which of so many rows, on a CPU, comes in each place: int64 (R,)."""
        if self.order_R is not None:
            return self.order_R
        row_R = torch.arange(num_rows)
        if 1 in self.shape:
            return row_R
        return row_R.view(*self.shape, -1).transpose(0, 1).flatten()


def uneven_turn(rows_AB: Tensor, num_rows: int) -> Turn:
    """The turn of blocks that have `rows_AB` (int64) rows each, `num_rows` in all."""
    order_R = _turned(rows_AB, num_rows)
    return Turn((rows_AB.shape[0], rows_AB.shape[1]), order_R, _turned(rows_AB.T, num_rows))


def _turned(rows_AB: Tensor, num_rows: int) -> Tensor:
    """For every place in the order of B × A blocks, where its row lies in that of A × B blocks."""
    start_AB = rows_AB.flatten().cumsum(0).view_as(rows_AB) - rows_AB
    turned = rows_AB.T.flatten()
    shift = start_AB.T.flatten() - (turned.cumsum(0) - turned)
    # The total is given, so that a GPU need not be asked for it.
    shift_R = shift.repeat_interleave(turned, output_size=num_rows)
    return shift_R + torch.arange(num_rows, device=shift.device)


def turn_rows(rows_RD: Tensor, turn: Turn) -> Tensor:
    """Rows in the order of the turned blocks: (R, D)."""
    if 1 in turn.shape:
        return rows_RD
    if turn.order_R is None:
        return rows_RD.unflatten(0, (*turn.shape, -1)).transpose(0, 1).flatten(0, 2)
    return _Permute.apply(rows_RD, turn.order_R, turn.inverse_R)  # type: ignore[return-value]


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
