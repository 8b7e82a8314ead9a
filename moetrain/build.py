"""From the configuration to a model: the one place that reads `model` and `moe` together."""

from __future__ import annotations

import torch

from moetrain.config import Config
from moetrain.model import Attention, Block, FeedForward, Transformer
from moetrain.moe import MoE


def build_model(config: Config, vocab_size: int) -> Transformer:
    """The model of a configuration on the meta device: shapes without memory."""
    with torch.device("meta"):
        blocks = [_block(config, layer) for layer in range(config.model.layers)]
        return Transformer(
            vocab_size,
            config.model.dim,
            config.model.norm_eps,
            config.model.tie_embeddings,
            blocks,
        )


def _block(config: Config, layer: int) -> Block:
    model, moe = config.model, config.moe
    attention = Attention(
        layer,
        model.dim,
        model.heads,
        model.kv_heads or model.heads,
        rope_theta=model.rope_theta,
        qk_norm=model.qk_norm,
        norm_eps=model.norm_eps,
    )
    ffn_dim = model.ffn_dim or 4 * model.dim
    if not is_moe_layer(config, layer):
        return Block(model.dim, model.norm_eps, attention, FeedForward(model.dim, ffn_dim), None)
    expert_dim = moe.expert_ffn_dim or ffn_dim
    shared = FeedForward(model.dim, moe.shared_experts * expert_dim) if moe.shared_experts else None
    return Block(model.dim, model.norm_eps, attention, shared, _moe(config, layer, expert_dim))


def is_moe_layer(config: Config, layer: int) -> bool:
    """Whether a block (from 0) holds experts: every n-th one past the first dense ones."""
    moe = config.moe
    past = layer - moe.first_dense
    return moe.experts > 0 and past >= 0 and past % moe.every == moe.every - 1


def _moe(config: Config, layer: int, expert_dim: int) -> MoE:
    moe = config.moe
    return MoE(
        layer,
        config.model.dim,
        expert_dim,
        moe.experts,
        moe.top_k,
        moe.router,
        renormalize=moe.renormalize,
        jitter=moe.jitter if moe.router == "switch" else 0.0,
        random_second=moe.random_second,
        capacity_factor=moe.capacity_factor,
        eval_capacity_factor=moe.eval_capacity_factor,
        min_capacity=moe.min_capacity,
        group=moe.group,
    )
