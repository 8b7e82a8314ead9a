"""moetrain's layer, as training uses it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contenders.case import LayerCase, Seen
from contenders.cell import Cell, weights
from moetrain.mesh import Mesh
from moetrain.moe import Gate, MoE
from moetrain.parallel import connect_experts

FACTOR = 1.25
"""Capacity factor of every system that has one, counted over a rank's tokens."""


class OwnLayer:
    """See `contenders.case.Layer`. The router is in fp32 whatever the experts are in."""

    def __init__(self, cell: Cell, device: torch.device, factor: float | None):
        shape = cell.shape
        given = weights(cell, dist.get_rank(), device)
        with torch.device("meta"):
            self.module = MoE(
                0,
                shape.dim,
                shape.expert_dim,
                shape.experts,
                Gate("topk", shape.top_k),
                capacity_factor=factor,
                group="microbatch",
            )
        self.module.router.weight = nn.Parameter(given.router_ED)
        self.module.experts.w_gate_up = nn.Parameter(given.gate_up_eDF)
        self.module.experts.w_down = nn.Parameter(given.down_eFD)
        connect_experts(self.module, Mesh(device, cell.ranks))
        num_tokens = cell.tokens // cell.ranks
        self.valid_1L = torch.ones(1, num_tokens, dtype=torch.bool, device=device)

    def forward(self, x_1LD: Tensor) -> tuple[Tensor, Tensor]:
        """See `Layer`."""
        y_1LD, stats, *_ = self.module(x_1LD, self.valid_1L, "train")
        return y_1LD, stats.balance_sum + stats.z_sum

    def look(self, x_1LD: Tensor) -> Seen:
        """See `Layer`."""
        decisions = self.module(x_1LD, self.valid_1L, "train").decisions
        return Seen(decisions.chosen_TK, int(decisions.plan.count_E.sum()))


def capacity(cell: Cell, device: torch.device) -> LayerCase:
    """With a capacity factor."""
    return LayerCase(cell, device, OwnLayer(cell, device, FACTOR))


def dropless(cell: Cell, device: torch.device) -> LayerCase:
    """Without a capacity."""
    return LayerCase(cell, device, OwnLayer(cell, device, None))
