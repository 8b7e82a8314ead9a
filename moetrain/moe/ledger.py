"""The drop ledger: what became of every assignment, counted exactly.

Shape suffixes: T tokens on this rank, K choices, E experts, O outcomes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.moe.capacity import Plan
from moetrain.moe.routing import Routing

OUTCOMES = ("kept", "spilled", "dropped", "not_sampled")
KEPT, SPILLED, DROPPED, NOT_SAMPLED = range(len(OUTCOMES))


class Ledger(NamedTuple):
    """What became of every assignment, exactly: int64 counts that add over batches and ranks."""

    outcome_EKO: Tensor
    """Assignments of valid tokens by the expert chosen, choice and outcome (as in OUTCOMES)."""
    assigned: Tensor
    """0-d: assignments of valid tokens, counted apart from their outcomes."""
    row_E: Tensor
    """Rows that each expert computes: after drops, spilled ones with the expert they went to."""
    tokens: Tensor
    """0-d: valid tokens."""
    lost_tokens: Tensor
    """0-d: valid tokens with no expert left."""
    slots: Tensor
    """0-d: expert slots provided, filled or not; see `Plan.slots`."""


def ledger(routing: Routing, settled: Routing, plan: Plan) -> Ledger:
    """Count what became of every assignment: as chosen, as settled, as planned."""
    num_experts, k = routing.num_experts, routing.expert_TK.shape[1]
    has_row_TK = plan.row_TK < plan.source_R.numel()
    is_moved_TK = settled.expert_TK != routing.expert_TK
    outcome_TK = torch.where(is_moved_TK, SPILLED, KEPT).where(has_row_TK, DROPPED)
    outcome_TK = outcome_TK.where(routing.sampled_TK, NOT_SAMPLED)
    choice_K = torch.arange(k, device=outcome_TK.device)
    cell_TK = (routing.expert_TK * k + choice_K) * len(OUTCOMES) + outcome_TK
    size = num_experts * k * len(OUTCOMES)
    cell_TK = cell_TK.where(routing.asks_TK, size)
    outcome_EKO = cell_TK.new_zeros(size + 1)
    outcome_EKO.scatter_add_(0, cell_TK.flatten(), torch.ones_like(cell_TK).flatten())
    return Ledger(
        outcome_EKO=outcome_EKO[:size].view(num_experts, k, len(OUTCOMES)),
        assigned=routing.asks_TK.sum(),
        row_E=plan.count_E,
        tokens=routing.valid_T.sum(),
        lost_tokens=(routing.valid_T & ~has_row_TK.any(dim=1)).sum(),
        slots=plan.slots,
    )


def is_conserved(ledger: Ledger) -> Tensor:
    """Whether every assignment has one outcome, and every row one assignment: bool, 0-d.

    True of a sum of ledgers when it is true of each. Entries may be stacked along a first
    dimension, which the answer then has, too. Needs no look at the host.
    """
    outcome_EO = ledger.outcome_EKO.sum(-2)
    arrived = outcome_EO[..., KEPT].sum(-1) + outcome_EO[..., SPILLED].sum(-1)
    return (
        (outcome_EO.sum((-2, -1)) == ledger.assigned)
        & (ledger.row_E.sum(-1) == arrived)
        & (ledger.row_E >= outcome_EO[..., KEPT]).all(-1)
        & (arrived <= ledger.slots)
    )


class GateMass(NamedTuple):
    """Gate weight as sums over the assignments of valid tokens that were sampled: 0-d."""

    total: Tensor
    dropped: Tensor
    """Of those that no expert had room for."""


def gate_mass(routing: Routing, plan: Plan) -> GateMass:
    """How much gate weight there was, and how much of it the drops took."""
    asks_TK = routing.asks_TK & routing.sampled_TK
    gate_TK = routing.gate_TK.detach()
    lost_TK = asks_TK & (plan.row_TK == plan.source_R.numel())
    return GateMass(gate_TK.where(asks_TK, 0).sum(), gate_TK.where(lost_TK, 0).sum())
