"""Low precision at the point of use, for engines that know a weight in one precision only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moetrain.model import Block, Transformer
from moetrain.moe import Router
from moetrain.parallel import replace_method


def compute_in(model: Transformer, dtype: torch.dtype) -> None:
    """Let the model compute with its weights rounded to `dtype`, but for the routers'.

    The weights stay as they are, and autograd brings their gradients back in the weights' own
    precision: what FSDP2 does with `MixedPrecisionPolicy(param_dtype=dtype)`. Weights are rounded
    outside of what is compiled, and inside of what is recomputed.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        attention = [block.attention_norm, block.attention, block.ffn_norm]
        _round(block, "attend", attention, dtype)
        if block.moe is not None:  # shared experts are computed inside it
            _round(block.moe, "forward", [block.moe, block.feed_forward], dtype)
        elif block.feed_forward is not None:
            _round(block.feed_forward, "forward", [block.feed_forward], dtype)
        if block.shared_gate is not None:
            _round(block.shared_gate, "forward", [block.shared_gate], dtype)
    _round(model, "forward", [model.embedding, model.norm, model.head], dtype)


def _round(
    module: nn.Module, method: str, parts: list[nn.Module | None], dtype: torch.dtype
) -> None:
    """Run a module's method with the weights of `parts` rounded."""
    owners = [
        owner
        for part in parts
        if part is not None
        for owner in part.modules()
        if not isinstance(owner, Router)
    ]
    plain: Callable[..., Any] = getattr(module, method)

    def run(*arguments: Any, **named: Any) -> Any:
        with _rounded(owners, dtype):
            return plain(*arguments, **named)

    replace_method(module, method, run)


@contextmanager
def _rounded(owners: list[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Put rounded weights in place, and the weights back."""
    weights = {
        (owner, name): weight
        for owner in owners
        for name, weight in owner._parameters.items()
        if weight is not None
    }
    for (owner, name), weight in weights.items():
        owner._parameters[name] = weight.to(dtype)  # type: ignore[assignment]
    try:
        yield
    finally:
        for (owner, name), weight in weights.items():
            owner._parameters[name] = weight
