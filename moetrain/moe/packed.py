"""Experts a few at a time, on their own rows while they are in the cache: for CPUs.

A GPU wants equal shapes and one product for all experts. A CPU gains nothing by that, and loses by
every empty row it multiplies and by every tensor that does not fit into its cache. So it takes a
group of neighbouring experts at a time that have about as many rows as each other: gathers their
rows, multiplies them, and forgets what is cheap to have again, the gathered rows and what goes
into the second product. Small experts in one product share its costs, and its threads have one
each; a large one is a group of its own.

Products of bf16 are compiled for every new shape, which takes longer than most products do. So
there small or grouped experts have rows in multiples of MANY_ROWS, large ones in smaller multiples
(`_unit`), the last ones zero: few shapes, met soon.

Shape suffixes: T tokens, K choices, E experts, D model width, F expert hidden width, R filled rows,
g experts of a group, n rows of each of them, P rows of all groups, X anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.moe.capacity import Plan
from moetrain.moe.rows import dot_rows, sum_rows, weigh_rows

MANY_ROWS = 128
LEAST_UNIT, MOST_UNIT = 8, 32
"""Bounds of what the rows of a large expert are a multiple of."""
GROUPS = (8, 4, 2)
"""Experts that are taken together, if they are alike; otherwise one."""
MOST_NUMBERS = 1 << 21
"""In the hidden activations of a group of several."""
EMPTY_FLOPS = 2e8
"""That may go into empty rows: for each expert of a group but one, since another group costs more;
and for one expert, since another shape does."""


class Group(NamedTuple):
    """Neighbouring experts that get equally many rows."""

    counts: list[int]
    """Filled rows of each."""
    room: int
    """Rows of each, n."""
    experts: slice
    rows: slice
    """Among the filled rows, sorted by expert."""
    places: slice
    """Among the rows of all groups."""

    @property
    def shape(self) -> tuple[int, int]:
        """(g, n)."""
        return len(self.counts), self.room


def cut(counts: Sequence[int], dim: int, hidden_dim: int, dtype: torch.dtype) -> list[Group]:
    """Experts of such width, with so many rows each, in groups."""
    sizes, row_flops = [], 18 * dim * hidden_dim  # forward and backward

    def room_of(counts: Sequence[int]) -> int:
        if dtype != torch.bfloat16:
            return max(counts)
        is_dear = len(counts) == 1 and MANY_ROWS * row_flops > EMPTY_FLOPS
        multiple = _unit(counts[0]) if is_dear else MANY_ROWS
        return -(-max(counts) // multiple) * multiple

    def are_alike(counts: Sequence[int]) -> bool:
        num_rows = len(counts) * room_of(counts)
        flops = row_flops * (num_rows - sum(counts))
        is_small = num_rows * hidden_dim <= MOST_NUMBERS
        return is_small and flops <= EMPTY_FLOPS * (len(counts) - 1)

    while (first := sum(sizes)) < len(counts):
        fitting = [size for size in GROUPS if first + size <= len(counts)]
        sizes.append(next((n for n in fitting if are_alike(counts[first : first + n])), 1))
    groups = []
    for last, size in zip(accumulate(sizes), sizes, strict=True):
        experts = slice(last - size, last)
        before = groups[-1] if groups else Group([], 0, slice(0), slice(0), slice(0))
        mine = list(counts[experts])
        room = room_of(mine)
        rows = slice(before.rows.stop, before.rows.stop + sum(mine))
        places = slice(before.places.stop, before.places.stop + size * room)
        groups.append(Group(mine, room, experts, rows, places))
    return groups


def _unit(num_rows: int) -> int:
    """The power of two from a 64th to a 32nd of the rows, within its bounds."""
    return min(max(LEAST_UNIT, 1 << max(0, num_rows.bit_length() - 6)), MOST_UNIT)


class Packing(NamedTuple):
    """Where tokens lie in the rows of all groups."""

    token_R: Tensor
    """int64: the token in each filled row."""
    place_TK: Tensor
    """int64: place of each assignment; P where it has no row."""
    groups: list[Group]

    @property
    def size(self) -> int:
        """P."""
        return self.groups[-1].places.stop


def _cut_for(counts: Sequence[int], w_down: Tensor) -> list[Group]:
    _, hidden_dim, dim = w_down.shape
    return cut(counts, dim, hidden_dim, w_down.dtype)


def _pack(plan: Plan, w_down: Tensor) -> Packing:
    """Leave out the empty rows of a plan, for such experts. Reads counts on the host."""
    is_filled_R = plan.source_R < plan.row_TK.numel()
    token_R = plan.source_R[is_filled_R] // plan.row_TK.shape[1]
    groups = _cut_for(plan.count_E.tolist(), w_down)
    place_R = torch.cat(
        [
            torch.arange(start, start + count)
            for group in groups
            for start, count in zip(_starts(group), group.counts, strict=True)
        ]
    )
    place = plan.row_TK.new_full((len(is_filled_R) + 1,), groups[-1].places.stop)
    place[:-1][is_filled_R] = place_R
    return Packing(token_R, place[plan.row_TK], groups)


def _starts(group: Group) -> Iterator[int]:
    """The first place of each of its experts."""
    return (group.places.start + i * group.room for i in range(len(group.counts)))


def run_packed(
    x_TD: Tensor, gate_TK: Tensor, w_gate_up: Tensor, w_down: Tensor, plan: Plan
) -> Tensor:
    """y[t] = Σ_k gate[t, k]·expert(x[t]) over the choices that have a row: (T, D).

    The experts are SwiGLU networks with weights (E, D, 2F) and (E, F, D).
    """
    packing, keeps = _pack(plan, w_down), torch.is_grad_enabled()
    return _Tokens.apply(x_TD, gate_TK, w_gate_up, w_down, packing, keeps)  # type: ignore[return-value]


def run_rows(
    rows_XD: Tensor, row_R: Tensor, counts: list[int], w_gate_up: Tensor, w_down: Tensor
) -> Tensor:
    """What each expert makes of its `counts` rows, in place, and zeros in all others: (X, D).

    `row_R` (int64) says where the rows of the first expert lie, then those of the second, …; no row
    is there twice.
    """
    groups, keeps = _cut_for(counts, w_down), torch.is_grad_enabled()
    return _Rows.apply(rows_XD, row_R, w_gate_up, w_down, groups, keeps)  # type: ignore[return-value]


class _Tokens(torch.autograd.Function):
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
        kept: list[Tensor] | None = [] if keeps else None
        result_PD = x_TD.new_empty(packing.size, x_TD.shape[1])
        for group in packing.groups:
            weights = w_gate_up[group.experts], w_down[group.experts]
            result_gnD = _forward(_gather(x_TD, packing.token_R, group), *weights, kept)
            result_PD[group.places] = result_gnD.flatten(0, 1)
        ctx.packing = packing
        ctx.save_for_backward(x_TD, gate_TK, w_gate_up, w_down, result_PD, *(kept or ()))
        return weigh_rows(result_PD, gate_TK, packing.place_TK, x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):  # type: ignore[override]
        x_TD, gate_TK, w_gate_up, w_down, result_PD, *kept = ctx.saved_tensors
        packing: Packing = ctx.packing
        gate_P = gate_TK.new_zeros(packing.size + 1)
        gate_P.scatter_(0, packing.place_TK.flatten(), gate_TK.flatten())
        grad_x_PD = torch.empty_like(result_PD)
        grads = _empty_grads(w_gate_up, w_down, is_wanted=ctx.needs_input_grad[2])
        for group, hidden_gn2F in zip(packing.groups, kept, strict=True):
            experts, places = group.experts, group.places
            grad_gnD = _gather(grad_TD, packing.token_R, group)
            _scale(grad_gnD, gate_P[places].view(*group.shape, 1))
            weights = w_gate_up[experts], w_down[experts]
            into = *_of(grads, experts), grad_x_PD[places].view_as(grad_gnD)
            _backward(grad_gnD, _gather(x_TD, packing.token_R, group), hidden_gn2F, weights, into)
        grad_x_TD = sum_rows(grad_x_PD, packing.place_TK)
        grad_gate_TK = dot_rows(grad_TD, result_PD, packing.place_TK).to(gate_TK.dtype)
        return grad_x_TD, grad_gate_TK, *grads, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_XD: Tensor,
        row_R: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        groups: list[Group],
        keeps: bool,
    ) -> Tensor:
        kept: list[Tensor] | None = [] if keeps else None
        result_XD = _zeros_besides(row_R, rows_XD)
        for group in groups:
            weights = w_gate_up[group.experts], w_down[group.experts]
            result_gnD = _forward(_gather(rows_XD, row_R, group), *weights, kept)
            _scatter(result_gnD, row_R, group, result_XD)
        ctx.groups = groups
        ctx.save_for_backward(rows_XD, row_R, w_gate_up, w_down, *(kept or ()))
        return result_XD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor):  # type: ignore[override]
        rows_XD, row_R, w_gate_up, w_down, *kept = ctx.saved_tensors
        grads = _empty_grads(w_gate_up, w_down, is_wanted=ctx.needs_input_grad[2])
        grad_rows_XD = _zeros_besides(row_R, rows_XD)
        for group, hidden_gn2F in zip(ctx.groups, kept, strict=True):
            x_gnD, experts = _gather(rows_XD, row_R, group), group.experts
            weights, grad_x_gnD = (w_gate_up[experts], w_down[experts]), torch.empty_like(x_gnD)
            into = *_of(grads, experts), grad_x_gnD
            _backward(_gather(grad_XD, row_R, group), x_gnD, hidden_gn2F, weights, into)
            _scatter(grad_x_gnD, row_R, group, grad_rows_XD)
        return grad_rows_XD, None, *grads, None, None


Grads: TypeAlias = tuple[Tensor | None, Tensor | None]
"""By the weights of experts; None where they are frozen."""


def _empty_grads(w_gate_up: Tensor, w_down: Tensor, is_wanted: bool) -> Grads:
    return (torch.empty_like(w_gate_up), torch.empty_like(w_down)) if is_wanted else (None, None)


def _of(grads: Grads, experts: slice) -> Grads:
    gate_up, down = (None if grad is None else grad[experts] for grad in grads)
    return gate_up, down


def _forward(
    x_gnD: Tensor, gate_up_gD2F: Tensor, down_gFD: Tensor, kept: list[Tensor] | None
) -> Tensor:
    """What a group makes of its rows; adds what its backward pass needs to `kept`, if any."""
    hidden_gn2F = _products(x_gnD, gate_up_gD2F)
    if kept is not None:
        kept.append(hidden_gn2F)
    # Not straight to where it goes: selective recomputation remembers what products return.
    return _products(swiglu_forward(hidden_gn2F), down_gFD)


def _backward(
    grad_gnD: Tensor,
    x_gnD: Tensor,
    hidden_gn2F: Tensor,
    weights: tuple[Tensor, Tensor],
    into: tuple[Tensor | None, Tensor | None, Tensor],
) -> None:
    """Write a group's gradients: by both weights, unless they are frozen, and by its rows."""
    (gate_up_gD2F, down_gFD), (grad_gate_up_gD2F, grad_down_gFD, grad_x_gnD) = weights, into
    product_gnF, grad_gn2F = swiglu_backward(_products(grad_gnD, down_gFD.mT), hidden_gn2F)
    if grad_down_gFD is not None:
        _products(product_gnF.mT, grad_gnD, out=grad_down_gFD)
        _products(x_gnD.mT, grad_gn2F, out=grad_gate_up_gD2F)
    _products(grad_gn2F, gate_up_gD2F.mT, out=grad_x_gnD)


def _products(one: Tensor, other: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrix products of each expert; that of a single one is faster as such."""
    if len(one) > 1:
        return torch.bmm(one, other, out=out)
    return torch.mm(one[0], other[0], out=None if out is None else out[0])[None]


def _gather(x_XD: Tensor, row_R: Tensor, group: Group) -> Tensor:
    """A group's rows, of which each is the `row_R`-th of x, zeros in its empty ones: (g, n, D)."""
    rows_gnD = x_XD.new_empty(*group.shape, x_XD.shape[1])
    parts = row_R[group.rows].split(group.counts)
    for rows_nD, row_n in zip(rows_gnD, parts, strict=True):
        torch.index_select(x_XD, 0, row_n, out=rows_nD[: len(row_n)])
        rows_nD[len(row_n) :] = 0
    return rows_gnD


def _scatter(rows_gnD: Tensor, row_R: Tensor, group: Group, into_XD: Tensor) -> None:
    """The opposite of `_gather`."""
    parts = row_R[group.rows].split(group.counts)
    for rows_nD, row_n in zip(rows_gnD, parts, strict=True):
        into_XD.index_copy_(0, row_n, rows_nD[: len(row_n)])


def _zeros_besides(row_R: Tensor, like_XD: Tensor) -> Tensor:
    """Room for rows, with zeros in all but some of them."""
    is_empty_X = torch.ones(len(like_XD), dtype=torch.bool).index_fill_(0, row_R, False)
    return torch.empty_like(like_XD).index_fill_(0, is_empty_X.nonzero().flatten(), 0)


def _scale(rows_gnD: Tensor, gate_gn1: Tensor) -> None:
    """rows *= gate, in the gates' precision, rounded once."""
    if rows_gnD.dtype == gate_gn1.dtype:
        rows_gnD *= gate_gn1
        return
    # In two parts, the smaller product rounded: much faster than with a gate of another type.
    high_gn1 = gate_gn1.to(rows_gnD.dtype)
    low_gn1 = (gate_gn1 - high_gn1).to(rows_gnD.dtype)
    torch.addcmul(rows_gnD * low_gn1, rows_gnD, high_gn1, out=rows_gnD)


def swiglu_forward(hidden: Tensor) -> Tensor:
    """silu(gate)·up of a packed (..., 2F) = [gate | up]: (..., F)."""
    gate, up = hidden.chunk(2, dim=-1)
    return _silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate)·up, (..., F), and the gradient by the packed (..., 2F).

    `grad` is the gradient by the former, and overwritten.
    """
    gate, up = hidden.chunk(2, dim=-1)
    grad_hidden = torch.empty_like(hidden)
    grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
    silu = _silu(gate)
    torch.mul(grad, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
    return silu.mul_(up), grad_hidden


def _silu(gate: Tensor) -> Tensor:
    return torch.ops.aten.silu.out(gate, out=gate.new_empty(gate.shape))
