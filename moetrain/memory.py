"""Bytes on one rank for weights, gradients, moments and activations, worked out from shapes.

Nothing is measured on a device. What is sharded over what: `moetrain.parallel`.
"""

from __future__ import annotations

from itertools import accumulate
from math import ceil, prod
from typing import NamedTuple

from torch import nn

from moetrain.activations import activations
from moetrain.config import Config
from moetrain.engines.deepspeed_config import bucket_size
from moetrain.model import Block, Transformer
from moetrain.moe import Experts, Router
from moetrain.optim import decays
from moetrain.precision import compute_dtype, computes_in


class Row(NamedTuple):
    """One kind of memory."""

    name: str
    num_bytes: int


def memory(config: Config, model: Transformer, vocab_size: int, world_size: int) -> list[Row]:
    """What the fullest rank holds in a backward pass, in the order in which it comes about.

    `model` may be on the meta device; `vocab_size` is the tokenizer's. Left out is what lasts for
    a moment alone (buffers of collectives, products inside a kernel), what the allocator cannot
    use, and what CUDA and NCCL take for themselves.
    """
    of_engine = _zero if config.engine.kind == "deepspeed" else _fsdp
    kept = activations(config, vocab_size)
    return [
        *of_engine(config, model, world_size),
        Row("activations", kept.outside + sum(kept.blocks)),
        Row("recomputed", kept.recomputed),
        Row("logits", kept.logits),
    ]


def _master(config: Config) -> int:
    """Bytes of a number in weights, reduced gradients and moments."""
    return 8 if config.engine.precision == "fp64" else 4


def _accumulates(config: Config, world_size: int) -> bool:
    return config.accumulation(world_size) > 1


# ---------------------------------------------------------------- the torch engine


def _fsdp(config: Config, model: Transformer, world_size: int) -> list[Row]:
    """Rank 0, on which no shard is smaller than elsewhere: see `moetrain.parallel`."""
    master, compute = _master(config), compute_dtype(config.engine).itemsize
    sharded, units = _sharded(config, model, world_size), _units(config, model)
    trained = _sharded(config, model, world_size, trained_only=True)
    # Ranks reduce gradients with the last micro-batch, and keep whole ones until then.
    reduced = _units(config, model, trained_only=True)
    between = sum(map(sum, reduced)) if _accumulates(config, world_size) else 0
    return [
        Row("weights", sharded * master),
        Row("gradients", (trained + between) * master),
        Row("Adam moments", 2 * trained * master),
        Row("gathered weights", _gathered(units) * compute),
        # Of the unit whose gradient is complete: as computed, and as sent in master precision.
        Row("gradients under way", max(map(max, reduced)) * (compute + master)),
    ]


def _sharded(
    config: Config, model: Transformer, world_size: int, trained_only: bool = False
) -> int:
    """Parameters of one rank: rows of every dense weight, a part of each of its experts, and the
    routers whole."""
    dp_shard, total = config.dp_shard(world_size), 0
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if trained_only and not weight.requires_grad:
                continue
            if isinstance(module, Router):
                total += weight.numel()
            elif isinstance(module, Experts):
                total += weight.numel() // dp_shard
            else:
                total += ceil(weight.shape[0] / dp_shard) * prod(weight.shape[1:])
    return total


def _units(config: Config, model: Transformer, trained_only: bool = False) -> list[list[int]]:
    """Parameters that are gathered at once, and of which a rank then computes with all.

    Those outside the blocks; then for every block those outside its experts, and its experts.
    """

    def numel(module: nn.Module) -> int:
        weights = [w for w in module.parameters() if w.requires_grad or not trained_only]
        return sum(weight.numel() for weight in weights)

    units = [[numel(model) - numel(model.blocks)]]
    for block in model.blocks:
        assert isinstance(block, Block)
        if block.moe is None:
            units.append([numel(block)])
        else:
            experts = numel(block.moe.experts) // config.parallel.ep
            units.append([numel(block) - numel(block.moe), experts])
    return units


def _gathered(units: list[list[int]]) -> int:
    """The most parameters that are gathered at one time: those outside the blocks, those of the
    block at work, and those outside the experts of the block that comes next in either pass."""
    (outside,), *blocks = units
    before = [0, *(block[0] for block in blocks[:-1])]
    after = [*(block[0] for block in blocks[1:]), 0]
    at_work = (sum(block) + max(ahead) for block, *ahead in zip(blocks, before, after, strict=True))
    return outside + max(at_work)


# ---------------------------------------------------------------- the deepspeed engine


class _Group(NamedTuple):
    """Weights that ZeRO lays out one after the other and cuts into equal shares."""

    sizes: list[int]
    """Of each weight, this rank's experts alone."""
    ranks: int
    """That share them."""
    stride: int
    """Ranks from one share to the next: rank r has share r // stride."""

    @property
    def share(self) -> int:
        """Parameters of one rank; DeepSpeed aligns shares to two numbers."""
        return 2 * ceil(sum(self.sizes) / (2 * self.ranks))

    def touched(self) -> list[int]:
        """For every share, the parameters of all weights that reach into it."""
        ends = list(accumulate(self.sizes))
        return [
            sum(
                size
                for size, end in zip(self.sizes, ends, strict=True)
                if end - size < first + self.share and end > first
            )
            for first in range(0, self.ranks * self.share, self.share)
        ]


def _zero(config: Config, model: Transformer, world_size: int) -> list[Row]:
    """Whole weights, and of all else the share that its stage leaves to a rank."""
    master, stage = _master(config), config.engine.zero_stage
    groups = _groups(config, model, world_size)
    whole, share = sum(sum(g.sizes) for g in groups), sum(g.share for g in groups)
    held = whole + _frozen(config, model)
    # Reduced gradients are kept for every weight that a share reaches into; those that are not
    # reduced yet are whole, all of them before stage 2.
    touched = [(group.touched(), group.stride) for group in groups]
    reduced = max(sum(of[r // stride] for of, stride in touched) for r in range(world_size))
    gradients = {0: whole, 1: whole + reduced, 2: reduced}[stage]
    bucket = bucket_size(config, world_size, whole)
    return [
        Row("weights", (held + (share if stage else 0)) * master),  # the share is a copy
        Row("gradients", gradients * master),
        Row("Adam moments", 2 * (share if stage else whole) * master),
        Row("rounded weights", _rounded(config, model)),
        Row("gradients under way", min(whole, bucket) * master),
    ]


def _groups(config: Config, model: Transformer, world_size: int) -> list[_Group]:
    """By weight decay, and experts by themselves where other ranks hold others."""
    ep, found = config.parallel.ep, {}
    for module in model.modules():
        is_expert = isinstance(module, Experts) and ep > 1
        for weight in module.parameters(recurse=False):
            if not weight.requires_grad:
                continue
            size = weight.numel() // ep if is_expert else weight.numel()
            found.setdefault((decays(weight), is_expert), []).append(size)
    return [
        _Group(sizes, world_size // ep, ep) if is_expert else _Group(sizes, world_size, 1)
        for (_, is_expert), sizes in found.items()
    ]


def _frozen(config: Config, model: Transformer) -> int:
    """Parameters of one rank that are not trained."""
    return sum(
        weight.numel() // (config.parallel.ep if isinstance(module, Experts) else 1)
        for module in model.modules()
        for weight in module.parameters(recurse=False)
        if not weight.requires_grad
    )


def _rounded(config: Config, model: Transformer) -> int:
    """Bytes of the weights in bf16: autograd keeps all, or those of a block that is recomputed."""
    if computes_in(config.engine) != "bf16":
        return 0
    outside, *blocks = (sum(unit) for unit in _units(config, model))
    recomputes = config.engine.activation_checkpointing != "none"
    return (outside + (max(blocks) if recomputes else sum(blocks))) * 2
