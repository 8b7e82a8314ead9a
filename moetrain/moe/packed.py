"""Experts one after another, each on its own rows while they are in the cache: for CPUs.

A GPU wants equal shapes and one product for all experts. A CPU gains nothing by that, and loses by
every empty row it multiplies and by every tensor that does not fit into its cache. So each expert
gathers its tokens, multiplies them, and forgets what is cheap to have again: the gathered tokens,
and what goes into its second product.

Products of bf16 are compiled for every new number of rows, which takes longer than most products
do. So each expert has rows in multiples of ROWS, the last ones zero: few numbers, met soon.

Shape suffixes: T tokens, K choices, E experts, D model width, F expert hidden width, R filled rows,
n rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.moe.capacity import Plan
from moetrain.moe.rows import sum_rows, weigh_rows

ROWS = 32


class Packing(NamedTuple):
    """Filled rows, sorted by expert, and their places in a buffer where every expert's part is a
    multiple of ROWS; the row past all of them is zero."""

    assignment_R: Tensor
    """int64: the assignment in each row."""
    place_TK: Tensor
    """int64: place of each assignment; the last one where it has no row."""
    counts: list[int]
    """Filled rows of each expert."""

    @property
    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Of every expert the rows, and their places with those that are left empty."""
        rooms = map(_room, self.counts)
        ends, places = accumulate(self.counts), accumulate(rooms)
        for count, end, place in zip(self.counts, ends, places, strict=True):
            yield slice(end - count, end), slice(place - _room(count), place)

    @property
    def size(self) -> int:
        """Rows of the buffer."""
        return sum(map(_room, self.counts)) + 1


def _room(count: int) -> int:
    return -(-count // ROWS) * ROWS


def pack(plan: Plan) -> Packing:
    """Leave out the empty rows of a plan. Reads counts on the host."""
    is_filled_R = plan.source_R < plan.row_TK.numel()
    packing = pack_sorted(plan.count_E.tolist(), plan.source_R[is_filled_R])
    place = packing.place_TK.new_full((len(is_filled_R) + 1,), packing.size - 1)
    place[:-1][is_filled_R] = packing.place_TK.flatten()
    return packing._replace(place_TK=place[plan.row_TK])


def pack_sorted(counts: list[int], assignment_R: Tensor) -> Packing:
    """Rows that are all filled and sorted by expert; `place_TK` is (R, 1)."""
    rooms = [_room(count) for count in counts]
    starts = [place - end for place, end in zip(_before(rooms), _before(counts), strict=True)]
    shift_E, count_E = torch.tensor(starts), torch.tensor(counts)
    place_R = torch.arange(len(assignment_R)) + shift_E.repeat_interleave(count_E)
    return Packing(assignment_R, place_R[:, None], counts)


def _before(sizes: list[int]) -> list[int]:
    """Where each part begins."""
    return [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]


def run_packed(
    x_TD: Tensor, gate_TK: Tensor, w_gate_up: Tensor, w_down: Tensor, packing: Packing
) -> Tensor:
    """y[t] = Σ_k gate[t, k]·expert(x[t]) over the choices that have a row: (T, D).

    The experts are SwiGLU networks with weights (E, D, 2F) and (E, F, D).
    """
    keeps = torch.is_grad_enabled()
    return _Pass.apply(x_TD, gate_TK, w_gate_up, w_down, packing, keeps)  # type: ignore[return-value]


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_TK: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        packing: Packing,
        keeps: bool,
    ) -> Tensor:
        token_R = packing.assignment_R // gate_TK.shape[1]
        kept, results = [], []
        for (rows, _), gate_up_D2F, down_FD in zip(packing.parts, w_gate_up, w_down, strict=True):
            hidden_n2F = _gather(x_TD, token_R[rows]) @ gate_up_D2F
            silu_nF, product_nF = swiglu_forward(hidden_n2F)
            # Not into a common buffer: selective recomputation remembers what products return.
            results.append(product_nF @ down_FD)
            if keeps:
                kept += [hidden_n2F, silu_nF]
        result_RD = torch.cat([*results, x_TD.new_zeros(1, x_TD.shape[1])])
        ctx.packing = packing
        ctx.save_for_backward(x_TD, gate_TK, w_gate_up, w_down, result_RD, *kept)
        return weigh_rows(result_RD, gate_TK, packing.place_TK, x_TD.dtype, all_exist=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):  # type: ignore[override]
        x_TD, gate_TK, w_gate_up, w_down, result_RD, *kept = ctx.saved_tensors
        packing: Packing = ctx.packing
        token_R = packing.assignment_R // gate_TK.shape[1]
        gate_R = gate_TK.flatten()[packing.assignment_R]
        grad_gate_R, grad_x_RD = torch.empty_like(gate_R), _buffer(x_TD, packing)
        grad_gate_up, grad_down = torch.empty_like(w_gate_up), torch.empty_like(w_down)
        for expert, (rows, places) in enumerate(packing.parts):
            hidden_n2F, silu_nF = kept[2 * expert : 2 * expert + 2]
            grad_nD, count = _gather(grad_TD, token_R[rows]), rows.stop - rows.start
            # Each product is rounded, their sum is not.
            overlap_nD = grad_nD * result_RD[places]
            grad_gate_R[rows] = overlap_nD[:count].sum(-1, dtype=gate_R.dtype)
            grad_nD[:count] *= gate_R[rows, None]
            grad_nF = grad_nD @ w_down[expert].T
            product_nF, grad_n2F = swiglu_backward(grad_nF, hidden_n2F, silu_nF)
            torch.mm(product_nF.T, grad_nD, out=grad_down[expert])
            x_nD = _gather(x_TD, token_R[rows])
            torch.mm(x_nD.T, grad_n2F, out=grad_gate_up[expert])
            torch.mm(grad_n2F, w_gate_up[expert].T, out=grad_x_RD[places])
        grad_gate_N = torch.zeros_like(gate_TK).flatten()
        grad_gate_N[packing.assignment_R] = grad_gate_R
        grad_x_TD = sum_rows(grad_x_RD, packing.place_TK, all_exist=True)
        return grad_x_TD, grad_gate_N.view_as(gate_TK), grad_gate_up, grad_down, None, None


def _buffer(x_TD: Tensor, packing: Packing) -> Tensor:
    """Room for all rows, the last one zero."""
    rows_RD = x_TD.new_empty(packing.size, x_TD.shape[1])
    rows_RD[-1] = 0
    return rows_RD


def _gather(x_TD: Tensor, token_n: Tensor) -> Tensor:
    """The vectors of some tokens, and zeros up to a multiple of ROWS."""
    count = len(token_n)
    rows_nD = x_TD.new_empty(_room(count), x_TD.shape[1])
    torch.index_select(x_TD, 0, token_n, out=rows_nD[:count])
    rows_nD[count:] = 0
    return rows_nD


def swiglu_forward(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) of a packed (..., 2F) = [gate | up], and its product with up, both (..., F)."""
    gate, up = hidden.chunk(2, dim=-1)
    silu = torch.ops.aten.silu.out(gate, out=torch.empty_like(gate))
    return silu, silu * up


def swiglu_backward(grad: Tensor, hidden: Tensor, silu: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate)·up, (..., F), and the gradient by the packed (..., 2F).

    `grad` is the gradient by the former, and overwritten; `silu` is silu(gate).
    """
    gate, up = hidden.chunk(2, dim=-1)
    grad_hidden = torch.empty_like(hidden)
    grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
    torch.mul(grad, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
    return silu * up, grad_hidden
