"""The MoE layer: route -> plan -> dispatch -> experts -> combine.

Shape suffixes: B sequences, L tokens of a sequence, T = B·L tokens on this rank, D model width,
E experts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe import balance, keyed, routing
from moetrain.moe.capacity import Ledger, Plan, capacity, ledger, plan_capacity, plan_dropless
from moetrain.moe.dispatch import Dispatcher, Local
from moetrain.moe.experts import Experts
from moetrain.moe.keyed import Draws
from moetrain.moe.routing import Routing

Mode = Literal["train", "eval", "generate"]
RouterName = Literal["switch", "gshard", "topk"]
GroupName = Literal["sequence", "microbatch"]


class LayerStats(NamedTuple):
    """What one layer's forward pass learned, as sums that the caller divides by global counts."""

    balance_sum: Tensor
    """Balance loss summed over routing groups; differentiable, 0-d."""
    z_sum: Tensor
    """Router z-loss summed over valid tokens; differentiable, 0-d."""
    ledger: Ledger


class Router(nn.Module):
    """Linear map to one logit per expert, in fp32 at least whatever the input."""

    def __init__(self, dim: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits (T, E) in fp32, or fp64 for fp64 input."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(wide), self.weight.to(wide))


class MoE(nn.Module):
    """A sparse feed-forward layer: each token passes the experts its gate chose.

    `group` is the routing group in which capacity is enforced: "sequence", "microbatch" (all tokens
    of the call: the drops then depend on how a batch is cut), or a number of tokens dividing the
    sequence. A capacity factor of None is dropless; generating text never drops.
    The layer is single-device code: under expert parallelism `dispatcher` is replaced from outside.
    """

    def __init__(
        self,
        layer: int,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int,
        router: RouterName,
        *,
        renormalize: bool = True,
        jitter: float = 0.0,
        random_second: bool = True,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = 2.0,
        min_capacity: int = 1,
        group: GroupName | int = "sequence",
    ):
        super().__init__()
        self.layer = layer
        self.top_k, self.num_experts = top_k, num_experts
        self.router_name: RouterName = router
        self.renormalize, self.jitter, self.random_second = renormalize, jitter, random_second
        self.factors = {"train": capacity_factor, "eval": eval_capacity_factor, "generate": None}
        self.min_capacity, self.group = min_capacity, group
        self.router = Router(dim, num_experts)
        self.experts = Experts(num_experts, dim, hidden_dim)
        self.dispatcher: Dispatcher = Local()

    def forward(
        self, x_BLD: Tensor, valid_BL: Tensor, mode: Mode, draws: Draws | None = None
    ) -> tuple[Tensor, LayerStats]:
        """Output (B, L, D) and the layer's losses and ledger.

        `valid_BL` (bool) is False for padding: its output is zero, and whatever it holds reaches
        nothing. `draws` are used in mode "train" alone; ValueError where a gate that draws at
        random lacks them.
        """
        valid_T = valid_BL.flatten()
        x_TD = x_BLD.flatten(0, 1).where(valid_T[:, None], 0)
        group_size = self._group_size(x_BLD, mode)
        record = self._route(x_TD, valid_T, self._own_draws(draws) if mode == "train" else None)
        plan = self._plan(record, group_size, self.factors[mode])
        arrived = self.dispatcher.dispatch(x_TD, plan)
        rows = self.experts(arrived.rows, arrived.counts)
        y_TD = self.dispatcher.combine(rows, arrived, plan, record.gate_TK)
        balance_loss = (
            balance.gshard_balance if self.router_name == "gshard" else balance.switch_balance
        )
        stats = LayerStats(
            balance_loss(record, group_size), balance.z_loss(record), ledger(record, plan)
        )
        return y_TD.view_as(x_BLD), stats

    def _group_size(self, x_BLD: Tensor, mode: Mode) -> int:
        batch, length, _ = x_BLD.shape
        if mode == "generate":  # a text of any length, dropless
            return batch * length
        if isinstance(self.group, int):
            return self.group
        return length if self.group == "sequence" else batch * length

    def _own_draws(self, draws: Draws | None) -> Draws | None:
        """The draws if this layer's gate makes any."""
        is_random = self.jitter > 0 or (self.router_name == "gshard" and self.random_second)
        if is_random and draws is None:
            raise ValueError(f"a {self.router_name} gate that draws at random needs `draws`")
        return draws if is_random else None

    def _route(self, x_TD: Tensor, valid_T: Tensor, draws: Draws | None) -> Routing:
        """Logits and gate; `draws` only where this pass draws."""
        if draws is not None and self.jitter > 0:
            noise_TD = keyed.uniform(draws, self.layer, "jitter", x_TD.shape[1])
            x_TD = x_TD * (1 + self.jitter * (2 * noise_TD - 1))
        logits_TE = self.router(x_TD)
        if self.router_name == "switch":
            return routing.switch(logits_TE, valid_T)
        if self.router_name == "topk":
            return routing.topk(logits_TE, valid_T, self.top_k, self.renormalize)
        uniform_T = None
        if draws is not None and self.random_second:
            uniform_T = keyed.uniform(draws, self.layer, "second expert")
        return routing.gshard(logits_TE, valid_T, uniform_T)

    def _plan(self, record: Routing, group_size: int, factor: float | None) -> Plan:
        if factor is None:
            return plan_dropless(record)
        slots = capacity(group_size, self.num_experts, self.top_k, factor, self.min_capacity)
        return plan_capacity(record, group_size, slots)
