"""All experts on this rank, one after another, on none but filled rows: for CPUs.

A GPU wants equal shapes and one product for all experts. A CPU gains nothing by that, and loses by
every empty row it multiplies and by every tensor that does not fit into its cache. So each expert
gathers its tokens, multiplies them while they are in the cache, and forgets what is cheap to have
again: the gathered tokens, and what goes into its second product.

Shape suffixes: T tokens, K choices, E experts, D model width, F expert hidden width, R rows,
n rows of one expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.moe.capacity import Plan
from moetrain.moe.experts import Experts, swiglu_backward, swiglu_forward
from moetrain.moe.rows import sum_rows, weigh_rows


class Rows(NamedTuple):
    """The filled rows of a plan, sorted by expert."""

    assignment_R: Tensor
    """int64: the assignment in each row."""
    row_TK: Tensor
    """int64: row of each assignment; R where it has none."""
    parts: list[slice]
    """The rows of each expert."""


def pack(plan: Plan) -> Rows:
    """Leave out the empty rows. Reads counts on the host."""
    num_assignments = plan.row_TK.numel()
    is_filled_R = plan.source_R < num_assignments
    assignment_R = plan.source_R[is_filled_R]
    moved_R = is_filled_R.cumsum(0).sub_(1).masked_fill_(~is_filled_R, len(assignment_R))
    moved_R = torch.cat([moved_R, moved_R.new_tensor([len(assignment_R)])])
    ends = plan.count_E.cumsum(0).tolist()
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return Rows(assignment_R, moved_R[plan.row_TK], parts)


class Waiting(NamedTuple):
    """Tokens, where they are, and the rows they are to be."""

    x_TD: Tensor
    rows: Rows


@final
class Packed:
    """A dispatcher that moves nothing: see the head of this module."""

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Waiting:
        """Note which rows are filled."""
        return Waiting(x_TD, pack(plan))

    def combine(self, experts: Experts, arrived: Waiting, gate_TK: Tensor) -> Tensor:
        """Gather, multiply, sum per token."""
        weights, keeps = experts.local_weights(), torch.is_grad_enabled()
        return _Pass.apply(arrived.x_TD, gate_TK, *weights, arrived.rows, keeps)  # type: ignore[return-value]


class _Pass(torch.autograd.Function):
    """y[t] = Σ_k gate[t, k]·expert(x[t]) over the choices that have a row."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_TK: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        rows: Rows,
        keeps: bool,
    ) -> Tensor:
        token_R = rows.assignment_R // gate_TK.shape[1]
        result_RD = _rows_and_zeros(x_TD, len(token_R))
        kept = []
        for part, gate_up_D2F, down_FD in zip(rows.parts, w_gate_up, w_down, strict=True):
            hidden_n2F = x_TD.index_select(0, token_R[part]) @ gate_up_D2F
            silu_nF, product_nF = swiglu_forward(hidden_n2F)
            torch.mm(product_nF, down_FD, out=result_RD[part])
            if keeps:
                kept += [hidden_n2F, silu_nF]
        ctx.rows = rows
        ctx.save_for_backward(x_TD, gate_TK, w_gate_up, w_down, result_RD, *kept)
        return weigh_rows(result_RD, gate_TK, rows.row_TK, x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):  # type: ignore[override]
        x_TD, gate_TK, w_gate_up, w_down, result_RD, *kept = ctx.saved_tensors
        rows: Rows = ctx.rows
        token_R = rows.assignment_R // gate_TK.shape[1]
        gate_R = gate_TK.flatten()[rows.assignment_R]
        grad_gate_R, grad_x_RD = torch.empty_like(gate_R), _rows_and_zeros(x_TD, len(token_R))
        grad_gate_up, grad_down = torch.empty_like(w_gate_up), torch.empty_like(w_down)
        for expert, part in enumerate(rows.parts):
            hidden_n2F, silu_nF = kept[2 * expert : 2 * expert + 2]
            grad_nD = grad_TD.index_select(0, token_R[part])
            # Each product is rounded, their sum is not.
            grad_gate_R[part] = (grad_nD * result_RD[part]).sum(-1, dtype=gate_R.dtype)
            grad_nD *= gate_R[part, None]
            grad_nF = grad_nD @ w_down[expert].T
            product_nF, grad_n2F = swiglu_backward(grad_nF, hidden_n2F, silu_nF)
            torch.mm(product_nF.T, grad_nD, out=grad_down[expert])
            x_nD = x_TD.index_select(0, token_R[part])
            torch.mm(x_nD.T, grad_n2F, out=grad_gate_up[expert])
            torch.mm(grad_n2F, w_gate_up[expert].T, out=grad_x_RD[part])
        grad_gate_N = torch.zeros_like(gate_TK).flatten()
        grad_gate_N[rows.assignment_R] = grad_gate_R
        grad_x_TD = sum_rows(grad_x_RD, rows.row_TK)
        return grad_x_TD, grad_gate_N.view_as(gate_TK), grad_gate_up, grad_down, None, None


def _rows_and_zeros(x_TD: Tensor, num_rows: int) -> Tensor:
    """Room for rows, and the row that stands for none."""
    rows_RD = x_TD.new_empty(num_rows + 1, x_TD.shape[1])
    rows_RD[num_rows] = 0
    return rows_RD
