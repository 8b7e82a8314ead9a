"""What training minimises: cross-entropy plus the auxiliary losses, over global counts.

objective = Σ cross-entropy / targets + balance_coef·balance + z_coef·z, where balance is a mean
over routing groups and z over tokens, each per layer and then averaged over the MoE layers. Every
mean is a local sum over a global count, so that the gradients summed over ranks and micro-batches
are those of the whole batch, however it is cut. Balance over the whole batch is no such mean; its
gradient by what each part adds is found from the sums of all parts first (`batch_balance`).

Shape suffixes: B sequences, L tokens of a sequence, N MoE layers, M masses, E experts.
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
from moetrain.moe import OUTCOMES, Gate, Ledger, Preferences
from moetrain.moe.balance import Demand, join, mass_gradient


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
    demands: tuple[Demand, ...]
    gate_mass_N2: Tensor
    """Gate weight in total, and of what was dropped."""
    ledgers: tuple[Ledger, ...]
    would_drop: tuple[Tensor, ...]
    """Of every layer, what each watched capacity factor would have dropped; see `LayerStats`."""
    preferences: tuple[Preferences, ...] = ()
    """Of every layer, where they were asked for."""

    def detach(self) -> Sums:
        """The same numbers, free of the graph."""
        return self._replace(
            loss=self.loss.detach(),
            balance_N=self.balance_N.detach(),
            z_N=self.z_N.detach(),
            demands=tuple(d._replace(mass_GME=d.mass_GME.detach()) for d in self.demands),
        )


def sums(output: Output) -> Sums:
    """Collect the sums of a forward pass that was given targets."""
    assert output.loss_sum is not None
    layers, nothing = output.layers, output.loss_sum.new_zeros(0)
    return Sums(
        loss=output.loss_sum,
        balance_N=torch.stack([s.balance_sum for s in layers]) if layers else nothing,
        z_N=torch.stack([s.z_sum for s in layers]) if layers else nothing,
        demands=tuple(s.demand for s in layers),
        gate_mass_N2=torch.stack([torch.stack(s.gate_mass) for s in layers])
        if layers
        else nothing.view(0, 2),
        ledgers=tuple(s.ledger for s in layers),
        would_drop=tuple(s.would_drop_F for s in layers),
        preferences=tuple(s.preferences for s in layers if s.preferences is not None),
    )


def add(one: Sums, other: Sums) -> Sums:
    """Two batches taken as one, as far as `reduce` asks; floats are added in fp64."""
    books = zip(one.ledgers, other.ledgers, strict=True)
    return Sums(
        loss=one.loss.double() + other.loss,
        balance_N=one.balance_N.double() + other.balance_N,
        z_N=one.z_N.double() + other.z_N,
        demands=(),
        gate_mass_N2=one.gate_mass_N2.double() + other.gate_mass_N2,
        ledgers=tuple(Ledger(*map(torch.add, ours, theirs)) for ours, theirs in books),
        would_drop=(),
    )


class BatchBalance(NamedTuple):
    """The balance losses of a global batch taken as one set of tokens, the same on every rank."""

    loss_N: Tensor
    gradients: tuple[Tensor, ...]
    """(1, M, E) for each layer: of the loss by the mass of the batch, and so of every part."""


def batch_balance(gate: Gate, parts: Sequence[tuple[Demand, ...]], mesh: Mesh) -> BatchBalance:
    """Bring the demands of all micro-batches (outer) and ranks together: two collectives."""
    layers = [
        join(Demand(*(torch.cat(column) for column in zip(*demands, strict=True))))
        for demands in zip(*parts, strict=True)
    ]
    shapes = [(d.count_GE.shape[1], d.mass_GME.shape[1]) for d in layers]
    counts = mesh.sum(torch.cat([torch.cat([d.count_GE[0], d.tokens_G]) for d in layers]))
    masses = mesh.sum(torch.cat([d.mass_GME.detach().flatten() for d in layers]).double())
    counts = counts.split([num_experts + 1 for num_experts, _ in shapes])
    masses = masses.split([num_experts * m for num_experts, m in shapes])
    totals = [
        Demand(count[None, :-1], mass.view(1, m, -1), count[-1:])
        for count, mass, (_, m) in zip(counts, masses, shapes, strict=True)
    ]
    losses, gradients = zip(*(mass_gradient(gate, total) for total in totals), strict=True)
    return BatchBalance(torch.cat(losses), gradients)


def objective(
    local: Sums,
    counts: Counts,
    balance_coef: float,
    z_coef: float,
    batch_balance: BatchBalance | None = None,
) -> Tensor:
    """This rank's and micro-batch's share of the objective: 0-d, differentiable.

    `batch_balance` replaces the mean over routing groups by the loss of the whole batch; only the
    gradient of that share is meant. A batch without targets or tokens has objective 0, not NaN.
    """
    targets, tokens, groups = (n.clamp(min=1) for n in counts)
    share = local.loss / targets
    if not local.ledgers:
        return share
    balance = local.balance_N.mean() / groups
    if batch_balance is not None:
        pairs = zip(local.demands, batch_balance.gradients, strict=True)
        shares = [(demand.mass_GME * gradient).sum() for demand, gradient in pairs]
        balance = torch.stack(shares).mean()
    return share + balance_coef * balance + z_coef * local.z_N.mean() / tokens


class Means(NamedTuple):
    """A whole step in numbers, the same on every rank."""

    loss: float
    """Nats per target."""
    balance_loss: float
    z_loss: float
    layers: tuple[LayerMeans, ...]
    """One per MoE layer."""
    targets: int
    """Tokens that carry a loss."""

    @property
    def ledgers(self) -> tuple[Ledger, ...]:
        """The ledgers of all MoE layers."""
        return tuple(layer.ledger for layer in self.layers)


class LayerMeans(NamedTuple):
    """One MoE layer, over all ranks and micro-batches."""

    ledger: Ledger
    dropped_gate_mass: float
    """Share of the gate weight that was dropped for lack of capacity."""
    outcomes_by_rank: tuple[tuple[int, ...], ...]
    """Assignments of every source rank by outcome, in the order of OUTCOMES."""


def reduce(
    parts: Sequence[Sums], counts: Counts, mesh: Mesh, batch_balance: BatchBalance | None = None
) -> Means:
    """Bring the sums of all micro-batches and ranks together: two collectives."""
    num_layers = len(parts[0].ledgers)
    floats = torch.stack(
        [
            torch.cat([p.loss[None], p.balance_N, p.z_N, p.gate_mass_N2.T.flatten()]).double()
            for p in parts
        ]
    )
    total = mesh.sum(floats.sum(0)).cpu()
    loss = total[0].item()
    balance, z, mass, dropped_mass = total[1:].view(4, num_layers).tolist()
    targets, tokens, groups = (max(1, int(n)) for n in counts)
    if batch_balance is not None:
        balance, groups = batch_balance.loss_N.tolist(), 1
    dropped_share = [
        dropped / total if total else 0.0 for dropped, total in zip(dropped_mass, mass, strict=True)
    ]
    ledgers = _reduce_ledgers([p.ledgers for p in parts], mesh)
    return Means(
        loss=loss / targets,
        balance_loss=sum(balance) / max(1, num_layers) / groups,
        z_loss=sum(z) / max(1, num_layers) / tokens,
        layers=tuple(
            LayerMeans(ledger, share, by_rank)
            for (ledger, by_rank), share in zip(ledgers, dropped_share, strict=True)
        ),
        targets=int(counts.targets),
    )


def _reduce_ledgers(
    parts: Sequence[tuple[Ledger, ...]], mesh: Mesh
) -> list[tuple[Ledger, tuple[tuple[int, ...], ...]]]:
    """Sum each layer's ledgers over parts and ranks, and its outcomes by rank: one collective."""
    if not parts[0]:
        return []
    mine = [
        Ledger(*(torch.stack(entries).sum(0) for entries in zip(*ledgers, strict=True)))
        for ledgers in zip(*parts, strict=True)
    ]
    entries = []
    for ledger in mine:
        outcome_WO = ledger.tokens.new_zeros(mesh.world, len(OUTCOMES))
        outcome_WO[mesh.rank] = ledger.outcome_EKO.sum((0, 1))
        entries += [*ledger, outcome_WO]
    total = mesh.sum(torch.cat([entry.flatten() for entry in entries])).cpu()
    sizes = [entry.numel() for entry in entries]
    summed = iter(
        flat.view(entry.shape) for flat, entry in zip(total.split(sizes), entries, strict=True)
    )
    return [
        (Ledger(*(next(summed) for _ in ledger)), tuple(map(tuple, next(summed).tolist())))
        for ledger in mine
    ]


def loads(parts: Sequence[Sums], mesh: Mesh) -> Tensor:
    """Choices of every expert before drops, over all micro-batches and ranks: int64 (N, E)."""
    return mesh.sum(
        torch.stack([torch.stack([d.count_GE[0] for d in p.demands]) for p in parts]).sum(0)
    )


def tally(parts: Sequence[Sums], mesh: Mesh) -> Tensor:
    """Of every layer the assignments, and how many of them each watched capacity factor would have
    dropped, over all micro-batches and ranks: int64 (N, 1 + factors)."""
    rows = [
        torch.stack(
            [
                torch.cat([ledger.assigned[None], dropped_F])
                for ledger, dropped_F in zip(part.ledgers, part.would_drop, strict=True)
            ]
        )
        for part in parts
    ]
    return mesh.sum(torch.stack(rows).sum(0))
