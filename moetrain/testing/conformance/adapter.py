"""What the suite asks of a Mixture-of-Experts layer, and what it gets back.

Shape suffixes: B sequences of a call, L tokens of a sequence, D model width, T tokens of this rank,
K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Mode = Literal["train", "eval"]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A layer to build and the batch that it is given."""

    gate: str
    """The algorithm, as the adapter calls it."""
    top_k: int
    chooses: Literal["logits", "groups", "tokens", "all", "fixed"]
    """How experts are chosen: the K largest logits; those of groups of experts; experts choose
    tokens; all of them; not by the token's vector."""
    capacity_factor: float | None = 1.25
    """Slots of an expert in a routing group are max(1, ⌈factor·K·S/E⌉); None drops nothing."""
    drop_policy: str = "position"
    draws: bool = False
    """Whether the layer draws at random in training, as far as its gate does."""
    experts: int = 8
    layers: int = 1
    """Layers of the same kind that all get the same input; their outputs are added."""
    dim: int = 8
    hidden_dim: int = 8
    sequences: int = 8
    length: int = 8
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        factor = "dropless" if self.capacity_factor is None else f"factor {self.capacity_factor:g}"
        return f"{self.gate}, {factor}, {self.drop_policy}"


@dataclass(frozen=True)
class Layout:
    """How the batch and the experts are spread: every rank has its own sequences."""

    ranks: int
    ep: int
    """Adjacent ranks that share one set of experts, E/ep consecutive ones each."""
    calls: int = 1
    """Micro-batches: forward and backward passes of a rank for one step."""

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks}, EP {self.ep}" + (f", {self.calls} calls" if self.calls > 1 else "")


ALONE = Layout(ranks=1, ep=1)


class Tokens(NamedTuple):
    """What one call of the layer gets."""

    x_BLD: Tensor
    valid_BL: Tensor
    """bool: False is padding."""
    vocabulary_BL: Tensor
    """int64: ids of a vocabulary, for gates that look at them."""
    id_BL: Tensor
    """int64: another number for every token of the batch, whatever the layout."""
    weight_BLD: Tensor
    """The loss is the mean over valid tokens of Σ_d weight·output."""


class Routes(NamedTuple):
    """What became of this rank's tokens in the first layer; int64, −1 for none."""

    expert_TK: Tensor
    """Experts chosen, before any drop."""
    placed_TK: Tensor
    """Experts that compute them, after drops."""
    gate_TK: Tensor | None
    """Weight of each choice in the output; only that of placed ones is looked at."""


class Pass(NamedTuple):
    """One step, before the weights change. What a system does not show is None (`Adapter.hidden`).

    All but `output_BLD` and `routes` are those of the whole batch, over all ranks and calls.
    """

    output_BLD: Tensor
    """Of all this rank's sequences."""
    loss: float
    auxiliary: float | None
    """Balance loss over all layers."""
    grads: Tensors
    """By the names of `Layer.state`, experts by global id; as the system's optimizer gets them: of
    loss + auxiliary. A parameter without gradient is absent. Empty after evaluation."""
    grad_norm: float | None
    """The norm that the system would clip by."""
    routes: Routes | None
    load_E: Tensor | None
    """Choices per expert of the first layer, before drops, as the system counts them."""
    outcomes: Mapping[str, int] | None
    """Assignments of the first layer by outcome, with their number as "assigned"."""
    effective_factor: float | None
    """Slots provided over assignments, as the system reports it."""
    bias_E: Tensor | None = None
    """After a step: what a gate that balances by a bias adds to the scores of the first layer."""


class Layer(Protocol):
    """One built system on one rank. Every method is called by all ranks alike."""

    def state(self) -> Tensors:
        """Weights by logical name, whole: those of experts (E, ...) by global id."""
        ...

    def load(self, state: Tensors) -> None:
        """Set every weight from such tensors."""
        ...

    def run(self, calls: list[Tokens], mode: Mode, valid_tokens: int, recompute: bool) -> Pass:
        """Forward and, in mode "train", backward. `valid_tokens` counts the whole batch.
        `recompute` runs the layer under activation checkpointing."""
        ...

    def save(self, folder: Path) -> None:
        """Write a checkpoint as the system does."""
        ...

    def restore(self, folder: Path) -> None:
        """Read it at any layout."""
        ...


class Adapter(Protocol):
    """A system under test. Picklable, because ranks may be processes."""

    name: str
    version: str
    group: Literal["sequence", "call"]
    """Where capacity and balance are counted: each sequence, or all tokens of a rank's call."""
    hidden: Mapping[str, str]
    """Fields of `Pass`, and methods of `Layer`, that do not exist, and why."""

    def refusal(self, case: Case, layout: Layout) -> str | None:
        """Why the system cannot be asked this; None when it can."""
        ...

    def padding(self, case: Case) -> str | None:
        """Why padding cannot be marked; None when it can."""
        ...

    def router(self, layer: int) -> str:
        """The name in `state` of the (E, D) matrix from which the logits of a layer come."""
        ...

    def experts(self, layer: int) -> str:
        """What the names of a layer's expert weights begin with."""
        ...

    def connect(self, layout: Layout) -> Any:
        """Join the ranks: called once on every rank of a default process group."""
        ...

    def build(self, case: Case, layout: Layout, connection: Any) -> Layer:
        """A layer as the system initialises it with seed 0."""
        ...
