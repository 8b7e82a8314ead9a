"""From the configuration to a model: the one place that reads `model` and `moe` together."""

from __future__ import annotations

import torch

from moetrain.autopilot import FACTORS
from moetrain.config import Config, MoEConfig
from moetrain.constraints import padded_vocab_size
from moetrain.model import Attention, Block, FeedForward, SharedGate, Transformer
from moetrain.moe import Experts, Gate, MoE, Router

FREEZABLE = {"router": Router, "experts": Experts}
"""The modules that train.freeze means."""


def build_model(config: Config, vocab_size: int) -> Transformer:
    """The model of a configuration on the meta device: shapes without memory.

    `vocab_size` is the tokenizer's, which `model.vocab_size` may pad. Raises UserError where it is
    too small for that.
    """
    rows = padded_vocab_size(config, vocab_size)
    with torch.device("meta"):
        blocks = [_block(config, layer) for layer in range(config.model.layers)]
        model = Transformer(
            rows,
            config.model.dim,
            config.model.norm_eps,
            config.model.tie_embeddings,
            blocks,
        )
    frozen = tuple(FREEZABLE[part] for part in config.train.freeze)
    for module in model.modules():
        if isinstance(module, frozen):
            module.requires_grad_(False)
    return model


def routing_group_tokens(config: Config) -> int | None:
    """Tokens of a routing group; None for a whole micro-batch."""
    group = config.moe.group
    if group == "sequence":
        return config.data.seq_len
    return None if group == "microbatch" else group


def training_factor(moe: MoEConfig) -> float | None:
    """The capacity factor that training begins with, which is the largest it may have; None where
    it is dropless."""
    return FACTORS[-1] if moe.capacity_factor == "auto" else moe.capacity_factor


def _block(config: Config, layer: int) -> Block:
    model, moe = config.model, config.moe
    attention = Attention(
        layer,
        model.dim,
        model.heads,
        model.num_kv_heads,
        model.attention_head_dim,
        rope_theta=model.rope_theta,
        qk_norm=model.qk_norm,
        norm_eps=model.norm_eps,
    )
    if layer not in moe.block_indices(model.layers):
        dense = FeedForward(model.dim, model.dense_ffn_dim)
        return Block(model.dim, model.norm_eps, attention, dense, moe=None)
    shared_dim = moe.shared_experts * config.expert_ffn_dim
    shared = FeedForward(model.dim, shared_dim) if shared_dim else None
    shared_gate = None
    if shared is not None and moe.shared_gate != "none":
        shared_gate = SharedGate(moe.shared_gate, model.dim)
    experts = _moe(moe, layer, model.dim, config.expert_ffn_dim)
    return Block(model.dim, model.norm_eps, attention, shared, experts, shared_gate)


def gate(moe: MoEConfig) -> Gate:
    """The routing algorithm of a configuration."""
    return Gate(
        moe.router,
        moe.top_k,
        renormalize=moe.renormalize,
        jitter=moe.jitter,
        random_second=moe.random_second,
        scale=moe.gate_scale,
        groups=moe.expert_groups,
        top_groups=moe.top_groups,
    )


def _moe(moe: MoEConfig, layer: int, dim: int, expert_dim: int) -> MoE:
    return MoE(
        layer,
        dim,
        expert_dim,
        moe.experts,
        gate(moe),
        capacity_factor=training_factor(moe),
        eval_capacity_factor=moe.eval_capacity_factor,
        min_capacity=moe.min_capacity,
        group=moe.group,
        drop_policy=moe.drop_policy,
        spill_depth=moe.spill_depth,
        watched_factors=FACTORS if moe.capacity_factor == "auto" else (),
        expert_dropout=moe.expert_dropout,
    )
