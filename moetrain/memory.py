"""Bytes on one rank for weights, gradients, moments and activations, worked out from shapes.

Nothing is measured on a device. What is sharded over what: `moetrain.parallel`.
"""

from __future__ import annotations

from math import ceil, prod
from typing import NamedTuple

from torch import nn

from moetrain.activations import COMPUTED_IN, activations
from moetrain.config import Config
from moetrain.model import Block, Transformer
from moetrain.moe import Experts, Router


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
    units = _units(config, model)
    # Ranks reduce gradients with the last micro-batch, and keep whole ones until then.
    between = sum(map(sum, units)) if config.accumulation(world_size) > 1 else 0
    kept = activations(config, vocab_size)
    return [
        Row("weights", sharded * master),
        Row("gradients", (sharded + between) * master),
        Row("Adam moments", 2 * sharded * master),
        Row("gathered weights", _gathered(units) * compute),
        # Of the unit whose gradient is complete: as computed, and as sent in master precision.
        Row("gradients under way", max(map(max, units)) * (compute + master)),
        Row("activations", kept.outside + sum(kept.blocks)),
        Row("recomputed", kept.recomputed),
        Row("logits", kept.logits),
    ]


def _sharded(config: Config, model: Transformer, world_size: int) -> int:
    """Parameters of one rank: rows of every dense weight, a part of each of its experts, and the
    routers whole."""
    dp_shard, total = config.dp_shard(world_size), 0
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if isinstance(module, Router):
                total += weight.numel()
            elif isinstance(module, Experts):
                total += weight.numel() // dp_shard
            else:
                total += ceil(weight.shape[0] / dp_shard) * prod(weight.shape[1:])
    return total


def _units(config: Config, model: Transformer) -> list[list[int]]:
    """Parameters that are gathered at once, and of which a rank then computes with all.

    Those outside the blocks; then for every block those outside its experts, and its experts.
    """
    units = [[_numel(model) - _numel(model.blocks)]]
    for block in model.blocks:
        assert isinstance(block, Block)
        if block.moe is None:
            units.append([_numel(block)])
        else:
            units.append(
                [_numel(block) - _numel(block.moe), _numel(block.moe.experts) // config.parallel.ep]
            )
    return units


def _gathered(units: list[list[int]]) -> int:
    """The most parameters that are gathered at one time: those outside the blocks, those of the
    block at work, and the unit that is fetched ahead in the order of either pass."""
    (outside,), *blocks = units
    before = [0, *(block[-1] for block in blocks[:-1])]
    after = [*(block[0] for block in blocks[1:]), 0]
    at_work = (sum(block) + max(ahead) for block, *ahead in zip(blocks, before, after, strict=True))
    return outside + max(at_work)


def _numel(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
