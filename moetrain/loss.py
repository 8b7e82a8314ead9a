"""Cross-entropy from hidden states, without ever holding the logits of all tokens.

Shape suffixes: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Target that carries no loss."""

CHUNK_TOKENS = 4096


def _chunk_loss(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    logits_TV = F.linear(hidden_TD, weight_VD)
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(wide), target_T, ignore_index=IGNORED, reduction="sum")


def cross_entropy_sum(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Σ over targets of −log softmax(hidden·weightᵀ)[target] in nats: fp32 (fp64 for fp64), 0-d.

    Targets equal to IGNORED add nothing, so all of them ignored gives 0. Logits exist for
    `chunk_tokens` tokens at a time, and are computed again in the backward pass.
    """
    chunks = zip(hidden_TD.split(chunk_tokens), target_T.split(chunk_tokens), strict=True)
    losses = [
        checkpoint(
            _chunk_loss, hidden, weight_VD, target, use_reentrant=False, preserve_rng_state=False
        )
        for hidden, target in chunks
    ]
    return torch.stack(losses).sum()  # type: ignore[arg-type]
