"""Engines: what turns a loss into the next weights, sharded over the ranks.

The training loop knows this protocol alone; what an engine needs of parameters stays inside it.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moetrain.model import Transformer


class Engine(Protocol):
    """A sharded model and its optimizer."""

    model: Transformer

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch; `last` says that a step follows.

        The gradients of all ranks and micro-batches are summed, so `loss` must already be divided
        by the global counts.
        """
        ...

    def step(self, lr: float) -> float:
        """Clip by the global gradient norm, update, clear the gradients.

        Returns the norm before clipping, the same on every rank. Where a loss or a gradient of any
        rank is not finite, neither is the norm, and weights and moments are left as they were.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by logical name and in full logical shape.

        Weights and buffers as `model.NAME`, moments and step counts as `optimizer.NAME.KEY`. The
        tensors are the live ones (DTensors where sharded): loading writes into them.
        """
        ...
