"""What training minimises: cross-entropy plus the auxiliary losses, over global counts.

objective = Σ cross-entropy / targets + balance_coef·balance + z_coef·z, where balance is a mean
over routing groups and z over tokens, each per layer and then averaged over the MoE layers. Every
mean is a local sum over a global count, so that the gradients summed over ranks and micro-batches
are those of the whole batch, however it is cut.

Shape suffixes: B sequences, L tokens of a sequence, N MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.data import Batch
from moetrain.loss import IGNORED
from moetrain.mesh import Mesh
from moetrain.model import Output
from moetrain.moe import Ledger


class Counts(NamedTuple):
    """What the means are over: int64, 0-d."""

    targets: Tensor
    """Tokens that carry a loss."""
    tokens: Tensor
    """Tokens that are not padding."""
    groups: Tensor
    """Routing groups with a token that is not padding."""


def count(batch: Batch, group_size: int | None) -> Counts:
    """Count one batch; `group_size` is the tokens of a routing group, None for the whole batch."""
    return Counts(
        targets=(batch.targets_BL != IGNORED).sum(),
        tokens=batch.valid_BL.sum(),
        groups=batch.valid_BL.view(-1, group_size or batch.valid_BL.numel()).any(1).sum(),
    )


def count_all(parts: Sequence[Counts], mesh: Mesh) -> Counts:
    """The counts of all batches on all ranks; a collective."""
    return Counts(*mesh.sum(torch.stack([torch.stack(part) for part in parts]).sum(0)))


class Sums(NamedTuple):
    """What a forward pass adds to the means and to the ledgers."""

    loss: Tensor
    """Cross-entropy in nats, 0-d."""
    balance_N: Tensor
    z_N: Tensor
    ledgers: tuple[Ledger, ...]

    def detach(self) -> Sums:
        """The same numbers, free of the graph."""
        return Sums(self.loss.detach(), self.balance_N.detach(), self.z_N.detach(), self.ledgers)


def sums(output: Output) -> Sums:
    """Collect the sums of a forward pass that was given targets."""
    assert output.loss_sum is not None
    nothing = output.loss_sum.new_zeros(0)
    return Sums(
        loss=output.loss_sum,
        balance_N=torch.stack([s.balance_sum for s in output.layers]) if output.layers else nothing,
        z_N=torch.stack([s.z_sum for s in output.layers]) if output.layers else nothing,
        ledgers=tuple(stats.ledger for stats in output.layers),
    )


def objective(local: Sums, counts: Counts, balance_coef: float, z_coef: float) -> Tensor:
    """This rank's and micro-batch's share of the objective: 0-d, differentiable.

    A batch without targets or tokens has objective 0, not NaN.
    """
    targets, tokens, groups = (n.clamp(min=1) for n in counts)
    share = local.loss / targets
    if len(local.ledgers):
        share = share + balance_coef * local.balance_N.mean() / groups
        share = share + z_coef * local.z_N.mean() / tokens
    return share


class Means(NamedTuple):
    """A whole step in numbers, the same on every rank."""

    loss: float
    """Nats per target."""
    balance_loss: float
    z_loss: float
    ledgers: tuple[Ledger, ...]
    """Summed over ranks and micro-batches, one per MoE layer."""


def reduce(parts: Sequence[Sums], counts: Counts, mesh: Mesh) -> Means:
    """Bring the sums of all micro-batches and ranks together: two collectives."""
    floats = [torch.cat([p.loss[None], p.balance_N, p.z_N]).double() for p in parts]
    loss, *auxiliary = mesh.sum(torch.stack(floats).sum(0)).tolist()
    num_layers = len(parts[0].ledgers)
    targets, tokens, groups = (max(1, int(n)) for n in counts)
    return Means(
        loss=loss / targets,
        balance_loss=sum(auxiliary[:num_layers]) / max(1, num_layers) / groups,
        z_loss=sum(auxiliary[num_layers:]) / max(1, num_layers) / tokens,
        ledgers=_reduce_ledgers([p.ledgers for p in parts], mesh),
    )


def _reduce_ledgers(parts: Sequence[tuple[Ledger, ...]], mesh: Mesh) -> tuple[Ledger, ...]:
    """Sum ledgers over parts and ranks in one collective."""
    if not parts[0]:
        return ()
    shapes = [entry.shape for entry in parts[0][0]]
    flat = [torch.cat([e.flatten() for ledger in part for e in ledger]) for part in parts]
    total = mesh.sum(torch.stack(flat).sum(0)).cpu()
    entries = iter(total.split([shape.numel() for _ in parts[0] for shape in shapes]))
    return tuple(Ledger(*(next(entries).view(shape) for shape in shapes)) for _ in parts[0])
