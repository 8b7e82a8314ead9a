"""What a configuration means on a number of ranks, worked out without starting any."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moetrain.build import build_model, routing_group_tokens
from moetrain.config import Config
from moetrain.data import is_on_hub, load_tokenizer
from moetrain.loss import CHUNK_TOKENS
from moetrain.model import Block, Transformer
from moetrain.moe import Draws, MoE, Router, capacity
from moetrain.sizes import sizes, train_flops_per_token

_KIND = 60
"""Width of the column that says what a block is."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def report(config: Config, world_size: int) -> str:
    """Mesh, layers, parameters, tokens per step and memory per device, as text.

    The configuration must have passed `constraints.check_world`. Raises UserError where the
    tokenizer, whose vocabulary the model needs, cannot be loaded.
    """
    model = build_model(config, _vocab_size(config))
    sections = (
        _mesh(config, world_size),
        _layers(model),
        _routing(config),
        _parameters(config, model),
        _step(config, world_size),
        _memory(config, model, world_size),
    )
    return "\n".join("\n".join(section) for section in sections)


def _vocab_size(config: Config) -> int:
    """The tokenizer's, which is not asked over the network where the configuration will do."""
    if config.model.vocab_size is not None and is_on_hub(config.data.tokenizer):
        return config.model.vocab_size
    return load_tokenizer(config.data.tokenizer).vocab_size


def _mesh(config: Config, world_size: int) -> Iterator[str]:
    replicas, ep = config.parallel.dp_replicate, config.parallel.ep
    shard = config.dp_shard(world_size)
    yield f"mesh       {world_size} ranks = dp_replicate {replicas} × dp_shard {shard}"
    if config.moe.experts:
        yield (
            f"           dp_shard {shard} = edp {shard // ep} × ep {ep}:"
            f" {config.moe.experts // ep} of {config.moe.experts} experts per rank"
        )


def _layers(model: Transformer) -> Iterator[str]:
    """One line for every run of equal blocks."""
    columns = f"{'feed-forward':{_KIND}s} {'parameters':>14s} {'active':>11s}"
    yield f"layers     blocks   {columns}  of each"
    first = 0
    for row, alike in groupby(_layer(block) for block in model.blocks):  # type: ignore[arg-type]
        last = first + len(list(alike)) - 1
        blocks = f"{first}" if first == last else f"{first}-{last}"
        yield f"           {blocks:7s}  {row}"
        first = last + 1


def _layer(block: Block) -> str:
    total = sum(p.numel() for p in block.parameters())
    active, kind = total, "dense"
    if block.moe is not None:
        experts, top_k = block.moe.num_experts, block.moe.gate.top_k
        of_one = sum(p.numel() for p in block.moe.experts.parameters()) // experts
        active -= of_one * (experts - top_k)
        kind = _kind(block, block.moe)
    return f"{kind:{_KIND}s} {total:14,} {active:11,}"


def _kind(block: Block, moe: MoE) -> str:
    """Gate, drop policy where anything can be dropped, and shared experts."""
    kind = f"{moe.gate.name}, {moe.gate.top_k} of {moe.num_experts} experts"
    has_capacity = any(factor is not None for factor in moe.factors.values())
    if has_capacity and moe.gate.name != "expert_choice":
        kind += f", drop policy {moe.drop_policy}"
    if block.feed_forward is not None:
        kind += " + shared"
    if block.shared_gate is not None:
        kind += f" ({block.shared_gate.kind})"
    return kind


def _routing(config: Config) -> Iterator[str]:
    moe = config.moe
    if not moe.experts:
        return
    group = routing_group_tokens(config) or config.train.micro_batch * config.data.seq_len
    chosen = f"{moe.top_k} of {moe.experts} experts for each"
    if moe.router == "expert_choice":
        chosen = f"whose slots the {moe.experts} experts fill by themselves"
    yield f"routing    groups of {group} tokens, {chosen}"
    for name, factor in (
        ("training", moe.capacity_factor),
        ("evaluation", moe.eval_capacity_factor),
    ):
        if factor is None:
            yield f"           {name}: dropless"
            continue
        slots = capacity(group, moe.experts, moe.top_k, factor, moe.min_capacity)
        effective = slots * moe.experts / (moe.top_k * group)
        yield (
            f"           {name}: {slots} slots per expert and group, capacity factor {factor}"
            f" (effective {effective:.4g})"
        )


def _parameters(config: Config, model: Transformer) -> Iterator[str]:
    counted = sizes(model)
    flops = train_flops_per_token(model, config.data.seq_len)
    yield f"parameters {counted.total:,} in total, {counted.active:,} active per token"
    yield f"           {flops / 1e9:.4g} GFLOP per token, forward and backward"


def _step(config: Config, world_size: int) -> Iterator[str]:
    train, seq_len = config.train, config.data.seq_len
    tokens, accumulation = train.global_batch * seq_len, config.accumulation(world_size)
    yield (
        f"step       {tokens:,} tokens = {world_size} ranks × {accumulation} micro-batches"
        f" × {train.micro_batch} sequences × {seq_len} tokens"
    )
    yield f"           {train.steps:,} steps, {tokens * train.steps:,} tokens in the run"


def _memory(config: Config, model: Transformer, world_size: int) -> Iterator[str]:
    """Bytes of the largest rank: its shards, what is gathered beside them, the activations.

    One block at a time is gathered, with all that lies outside the blocks. Between micro-batches a
    rank keeps whole gradients.
    """
    compute = _DTYPES[config.engine.precision]
    master = 8 if config.engine.precision == "fp64" else 4
    shard = -(-sizes(model).total // config.dp_shard(world_size)) * master
    outside, blocks = _computed(config, model)
    whole = outside + sum(blocks) if config.accumulation(world_size) > 1 else 0
    rows = (
        ("weights", shard),
        ("gradients", shard + whole * master),
        ("Adam moments", 2 * shard),
        ("gathered weights", (outside + max(blocks)) * compute.itemsize),
        ("activations", _activations(config, model.embedding.num_embeddings, compute)),
        ("logits", _logits(config, model, compute)),
    )
    yield "memory     per device, in GiB"
    for name, num_bytes in (*rows, ("together", sum(n for _, n in rows))):
        yield f"           {name:18s} {num_bytes / 2**30:9.3f}"


def _computed(config: Config, model: Transformer) -> tuple[int, list[int]]:
    """Parameters a rank computes with: those outside the blocks, and those of each block."""
    blocks = []
    for block in model.blocks:
        assert isinstance(block, Block)
        elsewhere = 0
        if block.moe is not None:
            of_experts = sum(p.numel() for p in block.moe.experts.parameters())
            elsewhere = of_experts - of_experts // config.parallel.ep
        blocks.append(sum(p.numel() for p in block.parameters()) - elsewhere)
    outside = sum(p.numel() for p in model.parameters())
    outside -= sum(p.numel() for p in model.blocks.parameters())
    return outside, blocks


def _logits(config: Config, model: Transformer, compute: torch.dtype) -> int:
    """Bytes of the logits that exist at one time: as computed, and their softmax and its gradient
    in fp32 at least."""
    wide = torch.promote_types(compute, torch.float32).itemsize
    tokens = min(CHUNK_TOKENS, config.train.micro_batch * config.data.seq_len)
    return tokens * model.embedding.num_embeddings * (compute.itemsize + 2 * wide)


def _activations(config: Config, vocab_size: int, compute: torch.dtype) -> int:
    """Bytes that one micro-batch's forward pass keeps for its backward pass.

    Found by running it on tensors without memory and adding up what autograd saves. Expert
    parallelism does not change it: a rank receives as many rows as it sends.
    """
    saved: dict[int, torch.UntypedStorage] = {}
    model = build_model(config, vocab_size)  # one to change

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        for module in model.modules():
            dtype = torch.float32 if isinstance(module, Router) else compute
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=dtype)))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
            if isinstance(module, MoE):  # dropless counts rows on the host; factor 1 has as many
                module.factors = {"train": module.factors["train"] or 1.0}
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        tokens_BL = torch.zeros(config.train.micro_batch, config.data.seq_len, dtype=torch.int64)
        draws = Draws(torch.zeros((), dtype=torch.int64), tokens_BL.flatten())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens_BL, targets_BL=tokens_BL, mode="train", draws=draws)
    return sum(storage.nbytes() for storage in saved.values())
