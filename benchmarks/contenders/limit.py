"""The limit: the experts' matrix products, on rows that lie sorted in equal groups, and no more.
And one large product, which tells what a GPU can do.

Shape suffixes: e experts on this rank, R rows of one of them, D model width, F hidden width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import synchronize
from torch import Tensor

from contenders.case import Facts
from contenders.cell import DTYPES, Cell, useful_flops, weights

Pair = tuple[Tensor, Tensor]
"""Two factors, (e, …, …) each."""
Way = Callable[[Pair], object]
LARGE = 8192
"""Larger ones are hardly faster on any GPU of today."""


def batched(pair: Pair) -> object:
    return torch.bmm(*pair)


def looped(pair: Pair) -> object:
    return [one @ other for one, other in zip(*pair, strict=True)]


def grouped(pair: Pair) -> object:
    """Rows of all experts are one matrix; in products for weights they are what is summed over."""
    one, other = pair
    if one.stride(-1) == 1:
        ends = _ends(one.shape[1], one)
        return F.grouped_mm(one.flatten(0, 1), other, offs=ends)
    ends = _ends(one.shape[2], one)
    return F.grouped_mm(one.mT.flatten(0, 1).mT, other.flatten(0, 1), offs=ends)


def _ends(rows: int, rows_of: Tensor) -> Tensor:
    ends = torch.arange(1, len(rows_of) + 1, device=rows_of.device) * rows
    return ends.to(torch.int32)


WAYS: dict[str, Way] = {"bmm": batched, "a loop of mm": looped, "grouped_mm": grouped}


class Limit:
    """See `harness.Case`: the way that is fastest here, of the plain ones that torch has."""

    def __init__(self, cell: Cell, device: torch.device):
        self.cell = cell
        self.products = products(cell, dist.get_rank(), device)
        self.name = fastest(WAYS, self.products, device)

    def step(self) -> None:
        for pair in self.products:
            WAYS[self.name](pair)

    def facts(self) -> Facts:
        return _facts(self.cell, self.name)


class Given:
    """The same by `torch.bmm`, in memory that is there already, one result after another in the
    same. (Else a large result has pages to be zeroed.)"""

    def __init__(self, cell: Cell, device: torch.device):
        self.cell = cell
        self.products = products(cell, dist.get_rank(), device)
        shapes = [(len(one), one.shape[1], other.shape[2]) for one, other in self.products]
        room = torch.empty(max(map(math.prod, shapes)), dtype=DTYPES[cell.dtype], device=device)
        self.results = [room[: math.prod(shape)].view(shape) for shape in shapes]

    def step(self) -> None:
        for pair, result in zip(self.products, self.results, strict=True):
            torch.bmm(*pair, out=result)

    def facts(self) -> Facts:
        return _facts(self.cell, "bmm")


def _facts(cell: Cell, way: str) -> Facts:
    assigned = cell.tokens * cell.shape.top_k // cell.ranks
    flops = useful_flops(cell.shape, assigned)
    return Facts(flops, flops, assigned, assigned, None, way)


class Large:
    """See `harness.Case`: a single product of square matrices of side LARGE."""

    def __init__(self, cell: Cell, device: torch.device):
        self.factor = torch.randn(LARGE, LARGE, device=device).to(DTYPES[cell.dtype])

    def step(self) -> None:
        torch.mm(self.factor, self.factor)

    def facts(self) -> Facts:
        return Facts(2 * LARGE**3, 2 * LARGE**3, 1, 1, None, f"{LARGE}³")


def products(cell: Cell, rank: int, device: torch.device) -> list[Pair]:
    """Forward: gate and up together, and down. Backward: of both, for rows and for weights."""
    _, gate_up_eDF, down_eFD = weights(cell, rank, device)
    assigned = cell.tokens * cell.shape.top_k
    shape, dtype = cell.shape, DTYPES[cell.dtype]

    def rows(width: int) -> Tensor:
        size = len(down_eFD), assigned // shape.experts, width
        return torch.randn(size, device=device).to(dtype)

    x_eRD, y_grad_eRD = rows(shape.dim), rows(shape.dim)
    hidden_eRF, gate_up_grad_eRF = rows(shape.expert_dim), rows(2 * shape.expert_dim)
    return [
        (x_eRD, gate_up_eDF),
        (hidden_eRF, down_eFD),
        (y_grad_eRD, down_eFD.mT),
        (hidden_eRF.mT, y_grad_eRD),
        (gate_up_grad_eRF, gate_up_eDF.mT),
        (x_eRD.mT, gate_up_grad_eRF),
    ]


def fastest(ways: dict[str, Way], pairs: Sequence[Pair], device: torch.device) -> str:
    """The name of the way that was fastest in the best of three turns."""
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(4):
        for name, way in ways.items():
            synchronize(device.type)
            started = time.perf_counter()
            for pair in pairs:
                way(pair)
            synchronize(device.type)
            if turn:  # the first one warms up
                best[name] = min(best[name], time.perf_counter() - started)
    return min(best, key=lambda name: best[name])
