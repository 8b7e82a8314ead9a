"""The decoder-only transformer around the MoE layers. Single-device code: parallelism is applied
from outside (`moetrain.parallel`).

Shape suffixes: B sequences, L tokens of a sequence, T = B·L, D model width, H heads, h head width,
V vocabulary (padding included).
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.loss import cross_entropy_sum
from moetrain.moe import Decisions, Draws, Experts, LayerStats, MoE, Router
from moetrain.moe.experts import swiglu
from moetrain.moe.layer import Mode


class Tokens(NamedTuple):
    """What an MoE layer is told of its tokens, in the order of its arguments."""

    valid_BL: Tensor
    mode: Mode
    draws: Draws | None
    token_BL: Tensor
    start: int
    """Position of the first token."""
    num_ranked: int = 0
    """Preferences to note of every token."""


class Output(NamedTuple):
    """What a forward pass returns: one of the first two, and one record per MoE layer."""

    loss_sum: Tensor | None
    """Cross-entropy summed over targets, in nats (0-d, fp32), when targets were given."""
    logits_BLV: Tensor | None
    """Otherwise the logits."""
    layers: tuple[LayerStats, ...]


class KVCache:
    """Keys and values of the tokens seen so far, one pair of tensors per block."""

    def __init__(self, num_layers: int, capacity: int):
        self.capacity, self.length = capacity, 0
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    def extend(self, layer: int, k_BHLh: Tensor, v_BHLh: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; returns all of them."""
        end = self.length + k_BHLh.shape[2]
        for store, new in ((self._keys, k_BHLh), (self._values, v_BHLh)):
            buffer = store[layer]
            if buffer is None:
                buffer = new.new_empty(*new.shape[:2], self.capacity, new.shape[3])
                store[layer] = buffer
            buffer[:, :, self.length : end] = new
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]  # type: ignore[index]


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in fp32 (1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


def rotate(x_BHLh: Tensor, position_L: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (2104.09864): pairs (i, i + h/2) turn by position·theta^(−2i/h)."""
    half = x_BHLh.shape[-1] // 2
    wide = torch.promote_types(x_BHLh.dtype, torch.float32)
    exponent = torch.arange(half, device=x_BHLh.device, dtype=wide) / half
    angle_Lh = position_L[:, None].to(wide) * theta**-exponent
    cos, sin = angle_Lh.cos().to(x_BHLh.dtype), angle_Lh.sin().to(x_BHLh.dtype)
    first, second = x_BHLh.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions.

    `qk_norm` RMS-normalises queries and keys: each head by itself ("head", with one weight for all
    heads: Qwen3, 2505.09388) or all heads together ("full": OLMoE, 2409.02060).
    """

    def __init__(
        self,
        layer: int,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        rope_theta: float,
        qk_norm: Literal["none", "head", "full"],
        norm_eps: float,
    ):
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.rope_theta = layer, heads, kv_heads, rope_theta
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(heads * head_dim, dim, bias=False)
        self.q_norm, self.k_norm = None, None
        if qk_norm != "none":
            q_heads, k_heads = (heads, kv_heads) if qk_norm == "full" else (1, 1)
            self.q_norm = RMSNorm(q_heads * head_dim, norm_eps)
            self.k_norm = RMSNorm(k_heads * head_dim, norm_eps)

    def forward(self, x_BLD: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """`mask` (bool, broadcast to (B, H, L, keys)) replaces the causal mask where given."""
        start = cache.length if cache else 0
        position_L = torch.arange(start, start + x_BLD.shape[1], device=x_BLD.device)
        q = self._heads(self.wq(x_BLD), self.q_norm)
        k = self._heads(self.wk(x_BLD), self.k_norm)
        v = self._heads(self.wv(x_BLD), None)
        q, k = rotate(q, position_L, self.rope_theta), rotate(k, position_L, self.rope_theta)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.kv_heads != self.heads
        )
        return self.wo(y.transpose(1, 2).flatten(2))

    def _heads(self, x_BLW: Tensor, norm: RMSNorm | None) -> Tensor:
        """(B, L, W = heads·h), normalised by stretches as wide as `norm`, to (B, heads, L, h)."""
        if norm is not None:
            x_BLW = norm(x_BLW.unflatten(-1, (-1, len(norm.weight)))).flatten(-2)
        return x_BLW.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """Dense SwiGLU feed-forward network (2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w_gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.w_down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Same shape out."""
        return self.w_down(swiglu(self.w_gate_up(x_BLD)))


class SharedGate(nn.Module):
    """How much of the routed and of the shared experts a token gets, learned per token.

    sigmoid: y = routed + sigmoid(w·x)·shared, as in Qwen2-MoE. softmax: c = softmax(W·x) and
    y = c₀·routed + c₁·shared, the residual MoE of PR-MoE (2201.05596) as DeepSpeed weighs it.
    """

    def __init__(self, kind: Literal["sigmoid", "softmax"], dim: int):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(1 if kind == "sigmoid" else 2, dim))

    def forward(self, x_BLD: Tensor, routed_BLD: Tensor, shared_BLD: Tensor) -> Tensor:
        """The weighted sum, (B, L, D); the weights are computed in fp32 at least."""
        wide = torch.promote_types(x_BLD.dtype, torch.float32)
        logits = F.linear(x_BLD.to(wide), self.weight.to(wide))
        if self.kind == "sigmoid":
            return routed_BLD + logits.sigmoid().to(x_BLD.dtype) * shared_BLD
        share_BL2 = logits.softmax(dim=-1).to(x_BLD.dtype)
        return share_BL2[..., :1] * routed_BLD + share_BL2[..., 1:] * shared_BLD


class Memory:
    """What a first pass decided, for the pass that recomputes it; empty before the first."""

    def __init__(self) -> None:
        self.decisions: Decisions | None = None


def _add(_x: Tensor, routed: Tensor, shared: Tensor) -> Tensor:
    return routed + shared


class Block(nn.Module):
    """Pre-norm attention and feed-forward; the latter dense, or experts with shared ones beside."""

    def __init__(
        self,
        dim: int,
        norm_eps: float,
        attention: Attention,
        feed_forward: FeedForward | None,
        moe: MoE | None,
        shared_gate: SharedGate | None = None,
    ):
        super().__init__()
        assert feed_forward or moe
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(dim, norm_eps)
        self.feed_forward = feed_forward
        self.moe = moe
        self.shared_gate = shared_gate

    def forward(
        self,
        x_BLD: Tensor,
        tokens: Tokens,
        mask: Tensor | None,
        cache: KVCache | None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, LayerStats | None]:
        """Output (B, L, D) and, from an MoE block, its statistics.

        With a `memory` the first pass notes in it what it decided, and later ones repeat that.
        """
        x_BLD, h_BLD = self.attend(x_BLD, mask, cache)
        if self.moe is None:
            assert self.feed_forward is not None
            return x_BLD + self.feed_forward(h_BLD), None
        shared = None if self.feed_forward is None else partial(self.feed_forward, h_BLD)
        if memory is None:
            output = self.moe(h_BLD, *tokens, meanwhile=shared)
        else:
            output = self.moe(h_BLD, *tokens, meanwhile=shared, decided=memory.decisions)
            memory.decisions = output.decisions
        y_BLD, stats, shared_BLD, _ = output
        if shared_BLD is not None:
            mix = self.shared_gate or _add
            y_BLD = mix(h_BLD, y_BLD, shared_BLD)
        return x_BLD + y_BLD, stats

    def attend(
        self, x_BLD: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and normalised for the feed-forward layer."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), mask, cache)
        return x_BLD, self.ffn_norm(x_BLD)


class Transformer(nn.Module):
    """Embedding, blocks, norm and output projection (the embedding itself when tied)."""

    def __init__(
        self, vocab_size: int, dim: int, norm_eps: float, tie_embeddings: bool, blocks: list[Block]
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(dim, norm_eps)
        self.head = None if tie_embeddings else nn.Linear(dim, vocab_size, bias=False)

    def forward(
        self,
        tokens_BL: Tensor,
        *,
        valid_BL: Tensor | None = None,
        targets_BL: Tensor | None = None,
        document_BL: Tensor | None = None,
        mode: Mode = "eval",
        draws: Draws | None = None,
        cache: KVCache | None = None,
        num_ranked: int = 0,
    ) -> Output:
        """Logits, or the summed loss when `targets_BL` (int64, IGNORED for no loss) is given.

        `valid_BL` (bool) is False for padding, which must be on the right. `document_BL` (int64)
        keeps attention inside documents of equal number. `cache` continues earlier tokens.
        `num_ranked` is for `MoE.forward`.
        """
        if valid_BL is None:
            valid_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
        mask = _attention_mask(tokens_BL, document_BL, cache)
        x_BLD = self.embedding(tokens_BL)
        start = cache.length if cache else 0
        tokens = Tokens(valid_BL, mode, draws, tokens_BL, start, num_ranked)
        layers = []
        for block in self.blocks:
            x_BLD, stats = block(x_BLD, tokens, mask, cache)
            if stats is not None:
                layers.append(stats)
        if cache is not None:
            cache.length += tokens_BL.shape[1]
        x_BLD = self.norm(x_BLD)
        weight_VD = self.embedding.weight if self.head is None else self.head.weight
        if targets_BL is None:
            return Output(None, F.linear(x_BLD, weight_VD), tuple(layers))
        loss_sum = cross_entropy_sum(x_BLD.flatten(0, 1), weight_VD, targets_BL.flatten())
        return Output(loss_sum, None, tuple(layers))


def _attention_mask(
    tokens_BL: Tensor, document_BL: Tensor | None, cache: KVCache | None
) -> Tensor | None:
    """The mask where plain causality is not enough: documents, or queries that start late."""
    length, start = tokens_BL.shape[1], cache.length if cache else 0
    if document_BL is None and start == 0:
        return None
    query = torch.arange(start, start + length, device=tokens_BL.device)
    causal_LK = torch.arange(start + length, device=tokens_BL.device) <= query[:, None]
    if document_BL is None:
        return causal_LK
    same_BLL = document_BL[:, :, None] == document_BL[:, None, :]
    return (causal_LK & same_BLL)[:, None]


def _generator(seed: int, name: str, index: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _truncated_normal(shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
    # Drawn in fp32 on the CPU, so that every precision and device starts from the same values.
    weight = torch.empty(shape)
    return nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)


def initial_value(
    module: nn.Module, name: str, shape: torch.Size, seed: int, num_layers: int, experts: range
) -> Tensor:
    """The value a parameter starts from: fp32 on the CPU, (len(experts), ...) for expert weights.

    Norms are 1. Matrices are truncated normal with standard deviation fan_in^-1/2 (the embedding:
    dim^-1/2), and (2·fan_in·layers)^-1/2 where they write to the residual stream (GPT-2's scaling).
    Gates of noisy_topk are zero, so that its noise alone decides at first (1701.06538 App. A).
    The draw is keyed by (seed, name) and, for experts, by the *global* expert id, of which
    `experts` is the range wanted: experts are distinct, and the same at every layout.
    """
    if isinstance(module, RMSNorm):
        return torch.ones(shape)
    if isinstance(module, Router) and module.starts_at_zero:
        return torch.zeros(shape)
    fan_in = shape[-2] if isinstance(module, Experts) else shape[-1]
    writes_residual = name.endswith(("wo.weight", "w_down.weight", "w_down"))
    std = (fan_in * (2 * num_layers if writes_residual else 1)) ** -0.5
    if isinstance(module, Experts):
        return torch.stack(
            [_truncated_normal(shape[1:], std, _generator(seed, name, id_)) for id_ in experts]
        )
    assert isinstance(module, nn.Linear | nn.Embedding | Router | SharedGate), type(module)
    return _truncated_normal(shape, std, _generator(seed, name, 0))
