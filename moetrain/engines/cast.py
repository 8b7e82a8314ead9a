"""Low precision at the point of use, for engines that know a weight in one precision only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moetrain.model import Transformer
from moetrain.moe import Router


def compute_in(model: Transformer, dtype: torch.dtype) -> None:
    """Let every module but the routers see its weights rounded to `dtype` while it runs.

    The weights stay as they are, and autograd brings their gradients back in the weights' own
    precision: what FSDP2 does with `MixedPrecisionPolicy(param_dtype=dtype)`.
    """
    in_blocks = {id(module) for module in model.blocks.modules()}
    # The model itself multiplies by the weights of its embedding and head.
    owners = {model: [module for module in model.modules() if id(module) not in in_blocks]}
    owners |= {module: [module] for module in model.blocks.modules()}
    for module, those in owners.items():
        if not isinstance(module, Router) and any(owner._parameters for owner in those):
            rounded = _Rounded(those, dtype)
            module.register_forward_pre_hook(rounded.begin)
            module.register_forward_hook(rounded.end, always_call=True)


class _Rounded:
    """The hooks of one module."""

    def __init__(self, owners: list[nn.Module], dtype: torch.dtype):
        self.owners, self.dtype = owners, dtype
        self.weights: list[dict[tuple[nn.Module, str], nn.Parameter]] = []
        """Of the calls under way; recompute may call a module inside its own backward pass."""

    def begin(self, *_: Any) -> None:
        """Put rounded weights in place; one that is in use already is no parameter any more."""
        self.weights.append(
            {
                (owner, name): weight
                for owner in self.owners
                for name, weight in owner._parameters.items()
                if isinstance(weight, nn.Parameter)
            }
        )
        for (owner, name), weight in self.weights[-1].items():
            owner._parameters[name] = weight.to(self.dtype)  # type: ignore[assignment]

    def end(self, *_: Any) -> None:
        """Put the weights back."""
        for (owner, name), weight in self.weights.pop().items():
            owner._parameters[name] = weight
