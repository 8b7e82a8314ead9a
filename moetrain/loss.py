"""Cross-entropy from hidden states, without ever holding the logits of all tokens.

Shape suffixes: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Target that carries no loss."""

CHUNK_TOKENS = 4096


def cross_entropy_sum(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Σ over targets of −log softmax(hidden·weightᵀ)[target] in nats: fp32 (fp64 for fp64), 0-d.

    `hidden_TD` and `weight_VD` are of one floating dtype, `target_T` is int64. Targets equal to
    IGNORED add nothing, so all of them ignored gives 0. Logits exist for `chunk_tokens` tokens at a
    time and once: the forward pass also computes the gradients of the sum, which are smaller, and
    the backward pass scales them (the idea of Liger-Kernel's fused linear cross-entropy,
    2410.10989 §3.2).
    """
    keeps = torch.is_grad_enabled()
    return _CrossEntropySum.apply(hidden_TD, weight_VD, target_T, chunk_tokens, keeps)  # type: ignore[return-value]


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        target_T: Tensor,
        chunk_tokens: int,
        keeps: bool,
    ) -> Tensor:
        losses, grads_TD, grad_VD = [], [], None
        chunks = zip(hidden_TD.split(chunk_tokens), target_T.split(chunk_tokens), strict=True)
        for hidden, target in chunks:
            loss, grad_logits = _chunk(hidden, weight_VD, target, keeps)
            losses.append(loss)
            if grad_logits is not None:
                grads_TD.append(grad_logits @ weight_VD)
                part_VD = grad_logits.T @ hidden
                # Several parts are added up as precisely as the loss.
                grad_VD = part_VD if grad_VD is None else grad_VD.to(loss.dtype).add_(part_VD)
                del grad_logits, part_VD  # before the next chunk has its own
        if keeps:
            ctx.save_for_backward(torch.cat(grads_TD), grad_VD)
            ctx.dtype = weight_VD.dtype
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        grad_TD, grad_VD = ctx.saved_tensors
        # With a dimension of its own, since a 0-d factor may be rounded to the other's dtype.
        factor = grad[None]
        return (grad_TD * factor).to(grad_TD.dtype), (grad_VD * factor).to(ctx.dtype), *[None] * 3


def _chunk(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, keeps: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of some tokens, and its gradient by their logits if that is wanted."""
    logits_TV = F.linear(hidden_TD, weight_VD)
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    log_TV = F.log_softmax(logits_TV, dim=-1, dtype=wide)
    del logits_TV
    has_loss_T1 = (target_T != IGNORED)[:, None]
    target_T1 = target_T[:, None].where(has_loss_T1, 0)
    loss = -log_TV.gather(1, target_T1).where(has_loss_T1, 0).sum()
    if not keeps:
        return loss, None
    grad_TV = log_TV.exp_().scatter_add_(1, target_T1, -torch.ones_like(target_T1, dtype=wide))
    return loss, grad_TV.mul_(has_loss_T1).to(hidden_TD.dtype)
