"""The MoE layer: route -> plan -> dispatch -> experts -> combine.

Shape suffixes: B sequences, L tokens of a sequence, T = B·L tokens on this rank, D model width,
E experts, K choices, G routing groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from moetrain.moe import balance, keyed
from moetrain.moe.balance import Demand
from moetrain.moe.capacity import Plan, capacity, plan_capacity, plan_dropless, would_drop
from moetrain.moe.dispatch import Dispatcher, Local
from moetrain.moe.dropout import with_keys
from moetrain.moe.experts import Experts
from moetrain.moe.keyed import Draws
from moetrain.moe.ledger import GateMass, Ledger, gate_mass, ledger
from moetrain.moe.preferences import Preferences, preferences
from moetrain.moe.router import Gate, Inputs, Router
from moetrain.moe.routing import Routing, comparable
from moetrain.moe.rows import is_eager_cpu
from moetrain.moe.spill import settle, spill

Mode = Literal["train", "eval", "generate"]
GroupName = Literal["sequence", "microbatch"]
DropPolicy = Literal["position", "probability", "random", "spill"]


class LayerStats(NamedTuple):
    """What one layer's forward pass learned, as sums that the caller divides by global counts."""

    balance_sum: Tensor
    """Balance loss summed over routing groups; differentiable, 0-d."""
    demand: Demand
    """What the whole call asked of the experts (G = 1), for a loss over the global batch."""
    z_sum: Tensor
    """Router z-loss summed over valid tokens; differentiable, 0-d."""
    ledger: Ledger
    gate_mass: GateMass
    would_drop_F: Tensor
    """int64: assignments that each watched capacity factor would have dropped."""
    preferences: Preferences | None = None
    """Where they were asked for."""


class Decisions(NamedTuple):
    """All that a routing decided, in integers: enough to route again without deciding anything."""

    chosen_TK: Tensor
    sampled_TK: Tensor
    settled_TK: Tensor
    """The experts that are asked in the end; see `Routed.settled`."""
    plan: Plan
    preferences: Preferences | None


class Routed(NamedTuple):
    """Where the tokens of one call go."""

    record: Routing
    """What the gate said; losses and counts are of this."""
    settled: Routing
    """What is carried out: another only where losers moved on (`spill`)."""
    plan: Plan
    group_size: int
    """Tokens of a routing group."""
    preferences: Preferences | None = None

    @property
    def decisions(self) -> Decisions:
        """What recomputation must repeat."""
        return Decisions(
            self.record.expert_TK,
            self.record.sampled_TK,
            self.settled.expert_TK,
            self.plan,
            self.preferences,
        )


class LayerOutput(NamedTuple):
    """What a forward pass of the layer returns."""

    y_BLD: Tensor
    stats: LayerStats
    beside: Tensor | None
    """What `meanwhile` computed."""
    decisions: Decisions


class MoE(nn.Module):
    """A sparse feed-forward layer: each token passes the experts its gate chose.

    `group` is the routing group in which capacity is enforced: "sequence", "microbatch" (all tokens
    of the call: the drops then depend on how a batch is cut), or a number of tokens dividing the
    sequence. A capacity factor of None is dropless; generating text never drops.

    `drop_policy` says who loses when an expert is full. position: later choices, then later tokens.
    probability: lower gates (V-MoE, 2106.05974 §4, ranks whole tokens by their best gate instead;
    with one choice the two are the same). random: by a keyed draw, in training; elsewhere as
    position. spill: as position, but losers go on to the next `spill_depth` experts they rank.

    What each of the `watched_factors` would have dropped is counted, too; where losers spill, that
    is what would have been lost without. `factors["train"]` may be changed between steps, on all
    ranks alike.

    In training, `expert_dropout` is the share of an expert's hidden units that a token goes without
    (2101.03961 §2.4).

    The layer is single-device code: under expert parallelism `dispatcher` is replaced from outside.
    """

    def __init__(
        self,
        layer: int,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        gate: Gate,
        *,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = 2.0,
        min_capacity: int = 1,
        group: GroupName | int = "sequence",
        drop_policy: DropPolicy = "position",
        spill_depth: int = 1,
        watched_factors: Sequence[float] = (),
        expert_dropout: float = 0.0,
    ):
        super().__init__()
        self.layer, self.num_experts, self.gate = layer, num_experts, gate
        self.factors = {"train": capacity_factor, "eval": eval_capacity_factor, "generate": None}
        self.min_capacity, self.group = min_capacity, group
        self.drop_policy: DropPolicy = drop_policy
        self.spill_depth = spill_depth
        self.watched_factors = tuple(watched_factors)
        self.router = Router(layer, gate, dim, num_experts)
        self.experts = Experts(num_experts, dim, hidden_dim, expert_dropout)
        self.dispatcher: Dispatcher = Local()

    def forward(
        self,
        x_BLD: Tensor,
        valid_BL: Tensor,
        mode: Mode,
        draws: Draws | None = None,
        token_BL: Tensor | None = None,
        start: int = 0,
        num_ranked: int = 0,
        meanwhile: Callable[[], Tensor] | None = None,
        decided: Decisions | None = None,
    ) -> LayerOutput:
        """Output (B, L, D), the layer's losses and counts, and what it decided.

        `valid_BL` (bool) is False for padding: its output is zero, and whatever it holds reaches
        nothing. `draws` are used in mode "train" alone. `token_BL` (int64) are vocabulary ids,
        which the gates `hash` and `random` look at, and `start` is the position of the first.
        With `num_ranked` the statistics hold so many preferences of every token; 0 notes none.
        `meanwhile` is called while tokens travel to their experts; its result is handed through.
        `decided` repeats an earlier pass: weights are computed anew, nothing is decided anew.

        Raises ValueError where a gate, drop policy or dropout lacks the draws or ids it needs.
        """
        routed = self.route(x_BLD, valid_BL, mode, draws, token_BL, start, num_ranked, decided)
        plan, gate_TK = routed.plan, routed.settled.gate_TK
        arrived = self.dispatcher.dispatch(self._sent(x_BLD.flatten(0, 1), mode, draws), plan)
        beside = None if meanwhile is None else meanwhile()
        y_TD = self.dispatcher.combine(self.experts, arrived, gate_TK)
        # Not a view: FSDP2 hangs its hooks on it.
        y_BLD = torch.empty_like(x_BLD).copy_(y_TD.view_as(x_BLD))
        return LayerOutput(y_BLD, self.stats(routed), beside, routed.decisions)

    def route(
        self,
        x_BLD: Tensor,
        valid_BL: Tensor,
        mode: Mode,
        draws: Draws | None = None,
        token_BL: Tensor | None = None,
        start: int = 0,
        num_ranked: int = 0,
        decided: Decisions | None = None,
    ) -> Routed:
        """All that happens before any row moves; takes and raises what `forward` does."""
        valid_T = valid_BL.flatten()
        group_size, draws = self._group_size(x_BLD, mode), self._draws(draws, mode)
        slots = self._slots(group_size, mode)
        position_L = torch.arange(start, start + x_BLD.shape[1], device=x_BLD.device)
        inputs = Inputs(
            _without_padding(x_BLD.flatten(0, 1), valid_T),
            valid_T,
            position_L.repeat(len(x_BLD)),
            None if token_BL is None else token_BL.flatten(),
            draws,
            group_size,
            slots,
            None if decided is None else decided.chosen_TK,
        )
        record = self.router(inputs)
        if decided is not None:
            record = record._replace(sampled_TK=decided.sampled_TK)
            spills = self.drop_policy == "spill" and slots is not None
            settled = settle(record, decided.settled_TK) if spills else record
            return Routed(record, settled, decided.plan, group_size, decided.preferences)
        routed = place(
            record, group_size, slots, self.drop_policy, self.spill_depth, self.layer, draws
        )
        if num_ranked:
            routed = routed._replace(preferences=preferences(record, num_ranked))
        return routed

    def _sent(self, x_TD: Tensor, mode: Mode, draws: Draws | None) -> Tensor:
        """What travels to the experts: the tokens, and where units are dropped their keys."""
        draws = self._draws(draws, mode)
        if draws is None or not self.experts.dropout:
            return x_TD
        return with_keys(x_TD, keyed.token_keys(draws, self.layer, "expert dropout"))

    def stats(self, routed: Routed) -> LayerStats:
        """Losses and counts of a routing."""
        demand = balance.demand(self.gate, routed.record, routed.group_size)
        return LayerStats(
            balance.balance(self.gate, demand).sum(),
            balance.join(demand),
            balance.z_loss(routed.record),
            ledger(routed.record, routed.settled, routed.plan),
            gate_mass(routed.record, routed.plan),
            self._would_drop(routed),
            routed.preferences,
        )

    def _would_drop(self, routed: Routed) -> Tensor:
        if not self.watched_factors:
            return routed.plan.row_TK.new_zeros(0)
        size = routed.group_size
        slots = [self._slots_at(factor, size) for factor in self.watched_factors]
        return would_drop(routed.record, size, slots)

    def _group_size(self, x_BLD: Tensor, mode: Mode) -> int:
        batch, length, _ = x_BLD.shape
        if mode == "generate":  # a text of any length, dropless
            return batch * length
        if isinstance(self.group, int):
            return self.group
        return length if self.group == "sequence" else batch * length

    def _slots(self, group_size: int, mode: Mode) -> int | None:
        factor = self.factors[mode]
        return None if factor is None else self._slots_at(factor, group_size)

    def _slots_at(self, factor: float, group_size: int) -> int:
        top_k = self.gate.top_k
        return capacity(group_size, self.num_experts, top_k, factor, self.min_capacity)

    def _draws(self, draws: Draws | None, mode: Mode) -> Draws | None:
        """The draws of a training pass in which something is drawn."""
        drops_at_random = self.drop_policy == "random" and self.factors["train"] is not None
        reasons = {
            f"a {self.gate.name} gate": self.gate.needs_draws,
            "drop policy random": drops_at_random,
            "expert dropout": self.experts.dropout > 0,
        }
        if mode != "train" or not any(reasons.values()):
            return None
        if draws is None:
            what = next(what for what, draws_at_random in reasons.items() if draws_at_random)
            raise ValueError(f"{what} draws at random in training and needs `draws`")
        return draws


def _without_padding(x_TD: Tensor, valid_T: Tensor) -> Tensor:
    """Zeros where there is padding."""
    return x_TD if _is_known_to_be_full(valid_T) else x_TD.where(valid_T[:, None], 0)


def _is_known_to_be_full(valid_T: Tensor) -> bool:
    """Whether a CPU, which need not wait for the answer, sees that there is no padding."""
    return is_eager_cpu(valid_T) and bool(valid_T.all())


def place(
    record: Routing,
    group_size: int,
    slots: int | None,
    policy: DropPolicy,
    spill_depth: int,
    layer: int,
    draws: Draws | None,
) -> Routed:
    """Give every assignment its row, or none, once a gate has chosen; dropless without `slots`.

    `layer` and `draws` key what the policy `random` draws; without draws it is `position`.
    """
    if slots is None:
        return Routed(record, record, plan_dropless(record), group_size)
    settled = spill(record, group_size, slots, spill_depth) if policy == "spill" else record
    priority_TK = None
    if policy == "probability":
        priority_TK = comparable(settled.gate_TK)
    elif policy == "random" and draws is not None:
        priority_TK = keyed.uniform(draws, layer, "drop", settled.expert_TK.shape[1])
    return Routed(
        record, settled, plan_capacity(settled, group_size, slots, priority_TK), group_size
    )
