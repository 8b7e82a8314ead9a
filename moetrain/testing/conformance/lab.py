"""Runs a system on ranks and keeps what came of it, so that several invariants can look at it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moetrain.testing.conformance.adapter import ALONE, Adapter, Case, Layout, Mode, Pass, Tensors
from moetrain.testing.conformance.batches import Edit, batch, cut, given_state, plain
from moetrain.testing.threads import simulate_ranks

Launch = Callable[..., list[Any]]
"""`simulate_ranks`, `run_ranks`, or a function of the same arguments."""


@dataclasses.dataclass(frozen=True)
class Order:
    """One run of one layer."""

    case: Case
    edit: Edit = plain
    mode: Mode = "train"
    recompute: bool = False
    rng: int = 0
    """Seed of torch's generator on every rank, for systems that draw from it."""


class Lab:
    """One system, the ranks it runs on, and all that was seen so far."""

    def __init__(self, adapter: Adapter, launch: Launch = simulate_ranks, timeout: float = 60.0):
        """`timeout` (seconds) is what a run may take before it counts as hanging."""
        self.adapter, self.launch, self.timeout = adapter, launch, timeout
        self._seen: dict[tuple[Layout, Order], list[Pass]] = {}

    def run(self, layout: Layout, case: Case, edit: Edit = plain, **options: Any) -> list[Pass]:
        """What each rank saw; see `Order`."""
        order = Order(case, edit, **options)
        if (layout, order) not in self._seen:
            self.prepare(layout, [order])
        return self._seen[layout, order]

    def prepare(self, layout: Layout, orders: Sequence[Order]) -> None:
        """Run several orders on the same ranks at once, which is cheaper than one by one."""
        missing = [order for order in orders if (layout, order) not in self._seen]
        if missing:
            by_rank = self.ranks(layout, carry_out, missing)
            for number, order in enumerate(missing):
                self._seen[layout, order] = [passes[number] for passes in by_rank]

    def ranks(self, layout: Layout, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """`fn(adapter, layout, *args)` on every rank."""
        return self.launch(layout.ranks, fn, self.adapter, layout, *args, timeout=self.timeout)

    def without_drops(self, case: Case, layout: Layout) -> Case:
        """The case with slots for all: dropless, where the system and the gate can be."""
        dropless = dataclasses.replace(case, capacity_factor=None)
        if self.adapter.refusal(dropless, layout) is None:
            return dropless
        return dataclasses.replace(case, capacity_factor=float(case.experts))

    def reference(self, layout: Layout) -> Layout:
        """One process with the same routing groups."""
        if self.adapter.group == "sequence":
            return ALONE
        return Layout(ranks=1, ep=1, calls=layout.ranks * layout.calls)


def carry_out(adapter: Adapter, layout: Layout, orders: Sequence[Order]) -> list[Pass]:
    """Every order in turn, on this rank, in layers of their own."""
    connection = adapter.connect(layout)
    return [_carry_out(adapter, layout, order, connection) for order in orders]


def _carry_out(adapter: Adapter, layout: Layout, order: Order, connection: Any) -> Pass:
    layer = adapter.build(order.case, layout, connection)
    state, tokens = order.edit(adapter, given_state(layer.state()), batch(order.case))
    layer.load(state)
    calls = cut(tokens, layout, dist.get_rank())
    torch.manual_seed(order.rng)
    return layer.run(calls, order.mode, int(tokens.valid_BL.sum()), order.recompute)


def initial_state(adapter: Adapter, layout: Layout, case: Case) -> dict[str, torch.Tensor]:
    """What the system starts from."""
    layer = adapter.build(case, layout, adapter.connect(layout))
    return {name: value.detach().clone() for name, value in layer.state().items()}


class Saved(NamedTuple):
    """A layer before it was saved or after it was read."""

    state: Tensors
    output: Pass


def save(adapter: Adapter, layout: Layout, case: Case, folder: Path) -> Saved:
    """Write a checkpoint of the given weights."""
    layer = adapter.build(case, layout, adapter.connect(layout))
    layer.load(given_state(layer.state()))
    layer.save(folder)
    return _saved(layer, case, layout)


def restore(adapter: Adapter, layout: Layout, case: Case, folder: Path) -> Saved:
    """Read it into a new layer."""
    layer = adapter.build(case, layout, adapter.connect(layout))
    layer.restore(folder)
    return _saved(layer, case, layout)


def _saved(layer: Any, case: Case, layout: Layout) -> Saved:
    state = {name: value.detach().clone() for name, value in layer.state().items()}
    tokens = batch(case)
    calls = cut(tokens, layout, dist.get_rank())
    return Saved(state, layer.run(calls, "eval", tokens.valid_BL.numel(), recompute=False))
