"""AdamW with decay groups, the learning-rate schedule, and the one global gradient norm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def adamw(
    parameters: Iterable[nn.Parameter],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW (1711.05101), fused; matrices decay, vectors (norms) do not.

    The learning rate is set for every step by `lr_at`. Parameters are grouped by mesh too, because
    a fused update takes tensors of one mesh.
    """
    groups: dict[tuple, list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((decays(parameter), mesh), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": members, "weight_decay": weight_decay if decay else 0.0}
            for (decay, _), members in groups.items()
        ],
        lr=0.0,
        betas=betas,
        eps=eps,
        fused=True,
    )
    # From the start rather than from the first step, so that a checkpoint has where to load.
    for parameter in itertools.chain.from_iterable(groups.values()):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def decays(parameter: Tensor) -> bool:
    """Whether weight decay is applied: to matrices, not to vectors (norms)."""
    return parameter.ndim >= 2


def lr_at(
    step: int,
    *,
    steps: int,
    peak: float,
    min_ratio: float,
    warmup_steps: int,
    schedule: Literal["cosine", "wsd"],
    decay_fraction: float,
) -> float:
    """Learning rate of a step, counted from 1 to `steps`.

    Linear warm-up to `peak`, then cosine decay to min_ratio·peak (1608.03983), or constant with a
    linear decay over the last decay_fraction of the steps (warmup-stable-decay, 2404.06395).
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = round(decay_fraction * steps)
        share = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
    return peak * (min_ratio + (1 - min_ratio) * share)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class StepOutcome(NamedTuple):
    """What came of an engine's step, the same on every rank."""

    loss: float
    """The objective that was backpropagated, summed over ranks and micro-batches."""
    grad_norm: float
    """Of the whole model, before clipping; not finite where a loss or gradient was not."""
    was_skipped: bool
    """Whether weights and moments were left as they were."""


def global_grad_norm(
    parameters: Iterable[nn.Parameter], replicas: int, loss: Tensor
) -> tuple[float, float]:
    """The 2-norm of the whole model's gradient, every parameter counted once, and the global loss.

    `replicas` is the number of ranks that hold the same shard of a DTensor; a plain tensor is whole
    on every rank. `loss` (fp64, 0-d) is this rank's share; the norm is NaN on every rank if it is
    not finite on any. Collective over the default group.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    sharded = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    return sum_totals(_squares(sharded) / replicas + _squares(whole) / dist.get_world_size(), loss)


def sum_totals(squares: Tensor, loss: Tensor) -> tuple[float, float]:
    """Global gradient norm and loss, from every rank's share of the squares and of the loss.

    Both are fp64 and 0-d. The norm is not finite if either is not on any rank. One collective over
    the default group, and the device is waited for once.
    """
    totals = torch.stack([squares + 0 * loss, loss])
    dist.all_reduce(totals)
    square, loss_sum = totals.tolist()
    return math.sqrt(square), loss_sum


def _squares(tensors: list[Tensor]) -> Tensor:
    return nn.utils.get_total_norm(tensors).double().square()


def scale_grads(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply every gradient in place."""
    torch._foreach_mul_([_local(p.grad) for p in parameters if p.grad is not None], factor)
