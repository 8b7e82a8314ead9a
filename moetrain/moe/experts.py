"""Expert feed-forward networks with packed weights, and the products over rows sorted by expert.

Shape suffixes: e experts on this rank, D model width, F expert hidden width, R rows, N of them that
belong to an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.moe.dropout import drop_units, split_keys
from moetrain.moe.packed import run_rows
from moetrain.moe.rows import is_eager_cpu


def swiglu(hidden: Tensor) -> Tensor:
    """silu(gate)·up of a packed (..., 2F) = [gate | up]: (..., F). (2002.05202)"""
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


class Experts(nn.Module):
    """SwiGLU experts: (silu(x·W_gate) * (x·W_up))·W_down, one set of weights per expert.

    The weights of all experts are one tensor each, so an expert without tokens gets gradient zero
    rather than none. Under expert parallelism the module holds just this rank's experts.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, dropout: float = 0.0):
        """`dropout` is the share of hidden units left out of rows that come with keys."""
        super().__init__()
        self.dropout = dropout
        self.w_gate_up = nn.Parameter(torch.empty(num_experts, dim, 2 * hidden_dim))
        self.w_down = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, rows: Tensor, counts: list[int] | None) -> Tensor:
        """Apply each expert to its rows; same shape out.

        `rows` is (e, R, D) with the same number of rows for every expert when `counts` is None,
        otherwise (R, D) sorted by expert with `counts[i]` rows for the i-th and R their sum. Rows
        with the columns of a key (`moetrain.moe.dropout`) lose hidden units, and come back without.
        """
        return self.feed()(rows, counts)

    def local_weights(self) -> tuple[Tensor, Tensor]:
        """What this rank holds of the weights: (e, D, 2F) and (e, F, D)."""
        weights = self.w_gate_up, self.w_down
        gate_up, down = (w.to_local() if isinstance(w, DTensor) else w for w in weights)
        return gate_up, down

    def feed(self) -> Feed:
        """All of this rank's experts."""
        return Feed(*self.local_weights(), self.dropout)

    def split(self, num_parts: int) -> list[Feed]:
        """The experts in consecutive parts of equal size.

        Raises ValueError when they cannot be cut so.
        """
        if num_parts == 1:  # a split would copy the gradient
            return [self.feed()]
        w_gate_up, w_down = self.local_weights()
        size, rest = divmod(len(w_down), num_parts)
        if rest:
            raise ValueError(f"{len(w_down)} experts cannot be cut into {num_parts} equal parts")
        # One split of each weight, so that the backward pass puts its gradient together at once.
        parts = zip(w_gate_up.split(size), w_down.split(size), strict=True)
        return [Feed(gate_up, down, self.dropout) for gate_up, down in parts]


class Feed(NamedTuple):
    """What some experts of this rank do to their rows."""

    w_gate_up: Tensor
    w_down: Tensor
    dropout: float

    def __call__(self, rows: Tensor, counts: list[int] | None) -> Tensor:
        """See `Experts.forward`."""
        if counts is not None and self.takes_any_order(rows):
            return self.in_place(rows, torch.arange(len(rows)), counts)
        key = None
        if rows.shape[-1] != self._dim:
            rows, key = split_keys(rows)
        product = _product_for(rows, self.w_gate_up, counts)
        hidden = swiglu(product(rows, self.w_gate_up))
        if key is not None:
            hidden = drop_units(hidden, key, self.dropout)
        return product(hidden, self.w_down)

    def takes_any_order(self, rows: Tensor) -> bool:
        """Whether `in_place` takes such rows: on CPUs, unless they bring keys."""
        return is_eager_cpu(rows) and rows.shape[-1] == self._dim

    def in_place(self, rows_RD: Tensor, row_N: Tensor, counts: list[int]) -> Tensor:
        """Apply each expert to its `counts` rows, wherever they lie: those of the first expert are
        the first of `row_N` (int64). All other rows come back as zeros: (R, D)."""
        return run_rows(rows_RD, row_N, counts, self.w_gate_up, self.w_down)

    @property
    def _dim(self) -> int:
        return self.w_down.shape[-1]


def _product_for(
    rows: Tensor, w_gate_up: Tensor, counts: list[int] | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """How rows meet the weights of their experts."""
    if counts is None:
        return torch.bmm
    return partial(_grouped if _can_group(rows, w_gate_up, counts) else _looped, counts=counts)


def _can_group(rows_RD: Tensor, w_gate_up: Tensor, counts: list[int]) -> bool:
    """Whether the grouped kernel takes these rows: bf16, of whole 16 bytes, and some for every
    expert; the gradient of one without may come back as garbage (pytorch #172439)."""
    widths = rows_RD.shape[-1], w_gate_up.shape[-1] // 2
    has_widths = all(width * rows_RD.element_size() % 16 == 0 for width in widths)
    return has_widths and rows_RD.dtype == torch.bfloat16 and min(counts) > 0


def _looped(rows_RD: Tensor, weight_eDF: Tensor, counts: list[int]) -> Tensor:
    """One product per expert, in any dtype."""
    pairs = zip(rows_RD.split(counts), weight_eDF.unbind(), strict=True)
    return torch.cat([rows @ weight for rows, weight in pairs])


def _grouped(rows_RD: Tensor, weight_eDF: Tensor, counts: list[int]) -> Tensor:
    """One grouped kernel over all experts."""
    ends = torch.tensor(counts, device=rows_RD.device).cumsum(0).to(torch.int32)
    product_RF = F.grouped_mm(rows_RD, weight_eDF, offs=ends)
    if product_RF.requires_grad:
        product_RF.register_hook(Tensor.contiguous)  # it takes no expanded gradient
    return product_RF
