"""A layer made ready to be measured: what a step of it is, whoever wrote the layer.

Shape suffixes: L tokens of this rank as one sequence, D model width, T tokens, K choices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from contenders.cell import Cell, tokens, useful_flops


class Seen(NamedTuple):
    """What a forward pass did with its assignments."""

    chosen_TK: Tensor | None
    """int64, in any order; -1 where it cannot be seen. None where nothing can."""
    kept: int
    """Assignments that were not dropped."""


class Layer(Protocol):
    """A layer around the weights of a cell, on one rank."""

    @property
    def module(self) -> nn.Module:
        """All of its parameters."""
        ...

    def forward(self, x_1LD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output, and the sum of the auxiliary losses, where the layer has any."""
        ...

    def look(self, x_1LD: Tensor) -> Seen:
        """Run it once more and watch."""
        ...


class Facts(NamedTuple):
    """Of one rank."""

    flops: int
    """Useful ones of a step, of what this rank's tokens asked for."""
    executed: int
    """FLOPs of all matrix products of a step: the router's, too, and those of empty rows."""
    kept: int
    assigned: int
    is_as_wanted: bool | None
    """Whether the choices are those of the cell; None where they cannot be seen."""
    remark: str = ""
    y_TD: Tensor | None = None
    x_grad_TD: Tensor | None = None
    """Only where the cell is to be checked."""


class LayerCase:
    """Forward and backward with the gradient that the next layer would send.

    Auxiliary losses are computed with the rest, and differentiated with a weight of zero: the same
    work, and input gradients that can be compared.
    """

    def __init__(self, cell: Cell, device: torch.device, layer: Layer):
        self.cell, self.layer = cell, layer
        x_TD, grad_TD, self.expert_TK = tokens(cell, dist.get_rank(), device)
        self.x_1LD, self.grad_1LD = x_TD[None].requires_grad_(), grad_TD[None]
        self.zero = torch.zeros((), device=device)

    def step(self) -> None:
        """Everything is let go at the end, so that a step's memory holds its gradients."""
        self._pass()
        self._clear()

    def _pass(self) -> Tensor:
        y_1LD, losses = self.layer.forward(self.x_1LD)
        ends, gradients = [y_1LD], [self.grad_1LD]
        if losses is not None:
            ends.append(losses)
            gradients.append(self.zero.to(losses.dtype))
        torch.autograd.backward(ends, gradients)
        return y_1LD.detach()

    def _clear(self) -> None:
        self.x_1LD.grad = None
        self.layer.module.zero_grad(set_to_none=True)

    def facts(self) -> Facts:
        """Runs the layer."""
        with torch.no_grad():
            chosen_TK, kept = self.layer.look(self.x_1LD)
        flops, executed = useful_flops(self.cell.shape, kept), executed_flops(self.step)
        facts = Facts(flops, executed, kept, self.expert_TK.numel(), self._as_wanted(chosen_TK))
        if not self.cell.is_checked:
            return facts
        y_1LD = self._pass()
        assert self.x_1LD.grad is not None
        facts = facts._replace(y_TD=y_1LD[0].cpu(), x_grad_TD=self.x_1LD.grad[0].cpu())
        self._clear()
        return facts

    def _as_wanted(self, chosen_TK: Tensor | None) -> bool | None:
        if chosen_TK is None:
            return None
        found_TKK = chosen_TK[:, :, None] == self.expert_TK[:, None]
        return bool((found_TKK.any(2) | (chosen_TK == -1)).all())


def heard(module: nn.Module, call: Any) -> Any:
    """What a module inside gave while `call` ran."""
    outputs: list[Any] = []
    hook = module.register_forward_hook(lambda *seen: outputs.append(seen[2]))
    call()
    hook.remove()
    return outputs[-1]


def executed_flops(step: Callable[[], object]) -> int:
    """Of its matrix products, counted as they are called."""
    with FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as counter:
        step()
    return counter.get_total_flops()


def _grouped_flops(one: torch.Size, other: torch.Size, *_: object, **__: object) -> int:
    """Of a product whose groups are rows of `one`, or what is summed over."""
    return 2 * one[0] * one[1] * other[-1]


_UNKNOWN_TO_TORCH = {torch.ops.aten._grouped_mm: _grouped_flops}
