"""Bytes on one rank for weights, gradients, moments and activations, worked out from shapes.

Nothing is measured on a device. What is sharded over what: `moetrain.parallel`.
"""

from __future__ import annotations

from itertools import pairwise
from math import ceil, prod
from typing import NamedTuple

from torch import nn

from moetrain.activations import COMPUTED_IN, activations
from moetrain.config import Config
from moetrain.model import Transformer
from moetrain.moe import Experts


class Row(NamedTuple):
    """One kind of memory."""

    name: str
    num_bytes: int


def memory(config: Config, model: Transformer, vocab_size: int, world_size: int) -> list[Row]:
    """What rank 0, on which no shard is smaller than elsewhere, holds in a backward pass.

    `model` may be on the meta device; `vocab_size` is the tokenizer's. Left out is what lasts for
    a moment alone (buffers of collectives, products inside a kernel), what the allocator cannot
    use, and what CUDA and NCCL take for themselves.
    """
    master = 8 if config.engine.precision == "fp64" else 4
    compute = COMPUTED_IN[config.engine.precision].itemsize
    sharded = _sharded(config, model, world_size)
    outside, blocks = _whole(config, model)
    # Ranks reduce gradients with the last micro-batch, and keep whole ones until then.
    between = outside + sum(blocks) if config.accumulation(world_size) > 1 else 0
    kept = activations(config, vocab_size)
    return [
        Row("weights", sharded * master),
        Row("gradients", (sharded + between) * master),
        Row("Adam moments", 2 * sharded * master),
        # The block at work, the one that is fetched ahead, and all that lies outside the blocks.
        Row(
            "gathered weights", (outside + max(a + b for a, b in pairwise([0, *blocks]))) * compute
        ),
        # Of the block whose gradient is complete: as computed, and as sent in master precision.
        Row("gradients under way", max(outside, *blocks) * (compute + master)),
        Row("activations", kept.outside + sum(kept.blocks)),
        Row("logits", kept.logits),
    ]


def _sharded(config: Config, model: Transformer, world_size: int) -> int:
    """Parameters of one rank: rows of every dense weight, and a part of each of its experts."""
    dp_shard, of_experts = config.dp_shard(world_size), _expert_weights(model)
    total = sum(weight.numel() // dp_shard for weight in of_experts.values())
    for name, weight in model.named_parameters():
        if name not in of_experts:
            total += ceil(weight.shape[0] / dp_shard) * prod(weight.shape[1:])
    return total


def _whole(config: Config, model: Transformer) -> tuple[int, list[int]]:
    """Parameters a rank computes with: those outside the blocks, and those of each block."""
    ep, blocks = config.parallel.ep, []
    for block in model.blocks:
        of_experts = sum(weight.numel() for weight in _expert_weights(block).values())
        blocks.append(_numel(block) - of_experts + of_experts // ep)
    return _numel(model) - _numel(model.blocks), blocks


def _expert_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Those of a module's experts, by their names in it."""
    return {
        f"{prefix}.{name}": weight
        for prefix, part in module.named_modules()
        if isinstance(part, Experts)
        for name, weight in part.named_parameters()
    }


def _numel(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
