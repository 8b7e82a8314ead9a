"""Parameters and FLOPs, counted on a built model (the meta device will do)."""

from __future__ import annotations

from typing import NamedTuple

from moetrain.model import Attention, Transformer
from moetrain.moe import MoE


class Sizes(NamedTuple):
    """Parameter counts of a model."""

    total: int
    """Every parameter, a tied embedding once."""
    active: int
    """Those a token passes: top-k of the experts, everything else whole."""
    embedding: int
    """Those of the input embedding, which a token looks up rather than multiplies."""


def sizes(model: Transformer) -> Sizes:
    """Count the parameters, with experts in full logical shape."""
    total, idle = sum(p.numel() for p in model.parameters()), 0
    for module in model.modules():
        if isinstance(module, MoE):
            held = sum(p.numel() for p in module.experts.parameters())
            # A rank may have its own experts alone in the module.
            of_one = held // len(module.experts.w_down)
            total += of_one * module.num_experts - held
            idle += of_one * (module.num_experts - module.gate.top_k)
    return Sizes(total, total - idle, model.embedding.weight.numel())


def train_flops_per_token(model: Transformer, seq_len: int) -> int:
    """Model FLOPs of forward and backward per token: 6·N + 12·layers·heads·head_dim·seq_len.

    N counts the active parameters that are multiplied (the output projection, not the look-up);
    attention counts in full although it is causal. (PaLM, 2204.02311, appendix B.) Empty slots and
    recomputation are not counted; dropped assignments are, and frozen weights as if they were
    trained.
    """
    counted = sizes(model)
    multiplied = counted.active - (0 if model.head is None else counted.embedding)
    widths = sum(m.wo.in_features for m in model.modules() if isinstance(m, Attention))
    return 6 * multiplied + 12 * widths * seq_len
