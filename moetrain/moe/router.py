"""The router: from the vectors of tokens to their routing, whichever gate is chosen.

`ROUTES` maps every gate's name to the function that feeds it: logits from this module's weights,
draws, positions. The gates themselves are pure functions (`moetrain.moe.routing`).

Shape suffixes: T tokens on this rank, D model width, E experts, A groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe import keyed, routing
from moetrain.moe.keyed import Draws
from moetrain.moe.routing import Routing

RouterName = Literal[
    "switch",
    "gshard",
    "topk",
    "noisy_topk",
    "sigmoid",
    "expert_choice",
    "hash",
    "random",
    "balanced",
    "dense",
    "hierarchical",
]


@dataclass(frozen=True)
class Gate:
    """A routing algorithm and its settings; those of another algorithm have no effect."""

    name: RouterName
    top_k: int
    """Choices per token."""
    renormalize: bool = True
    """topk, hierarchical: divide the chosen gates by their sum."""
    jitter: float = 0.0
    """switch: multiply what the router sees by U[1 − jitter, 1 + jitter] in training."""
    random_second: bool = True
    """gshard: keep the second expert with probability min(1, 2·gate) in training."""
    scale: float = 1.0
    """sigmoid: what the gates of a token add up to."""
    groups: int = 1
    """sigmoid, hierarchical: equal groups of consecutive experts."""
    top_groups: int = 1
    """sigmoid, hierarchical: groups open to a token."""

    @property
    def needs_draws(self) -> bool:
        """Whether the gate draws at random in training."""
        return (
            self.name in ("random", "noisy_topk")
            or (self.name == "switch" and self.jitter > 0)
            or (self.name == "gshard" and self.random_second)
        )


class Inputs(NamedTuple):
    """What a gate may know of the tokens."""

    x_TD: Tensor
    valid_T: Tensor
    position_T: Tensor
    """int64: place of each token in its sequence."""
    token_T: Tensor | None
    """int64: vocabulary ids."""
    draws: Draws | None
    """None outside training, where nothing is drawn."""
    group_size: int
    """Tokens of a routing group."""
    slots: int | None
    """Capacity of an expert in a group; None when dropless."""
    chosen_TK: Tensor | None = None
    """int64: what an earlier pass chose, to be weighed anew."""


class Router(nn.Module):
    """One linear map from tokens to logits (what some gates need beside it is named below).

    All in fp32 at least, whatever the input.
    """

    bias: Tensor
    """sigmoid alone: (E,), what the choice adds to the scores. Changed by `rebalance` alone."""

    def __init__(self, layer: int, gate: Gate, dim: int, num_experts: int):
        """`layer` keys the random draws."""
        super().__init__()
        self.layer, self.gate, self.num_experts = layer, gate, num_experts
        self.starts_at_zero = gate.name == "noisy_topk"  # 1701.06538 App. A
        if gate.name not in ("hash", "random", "balanced"):
            self.weight = nn.Parameter(torch.empty(num_experts, dim))
        if gate.name == "noisy_topk":
            self.noise_weight = nn.Parameter(torch.empty(num_experts, dim))
        if gate.name == "hierarchical":
            self.group_weight = nn.Parameter(torch.empty(gate.groups, dim))
        if gate.name == "sigmoid":
            self.register_buffer("bias", torch.zeros(num_experts))

    @torch.no_grad()
    def rebalance(self, load_E: Tensor, rate: float) -> None:
        """Move the bias towards even load: b += rate·sign(mean load − load) (2408.15664, Alg. 1).

        `load_E` (int64) counts the choices of a whole optimizer step before drops, over all ranks.
        """
        below_mean_E = load_E.sum() - load_E * self.num_experts
        self.bias += rate * below_mean_E.sign().to(self.bias.dtype)

    def forward(self, inputs: Inputs) -> Routing:
        """Route every token.

        Raises ValueError where the gate needs draws, vocabulary ids or a capacity and has none.
        """
        # Once for all of the router's weights, because autograd keeps what they multiply.
        x_TD = inputs.x_TD.to(torch.promote_types(inputs.x_TD.dtype, torch.float32))
        return ROUTES[self.gate.name](self, inputs._replace(x_TD=x_TD))


def _logits(weight_ED: Tensor, x_TD: Tensor) -> Tensor:
    """(T, E), as precise as x."""
    return F.linear(x_TD, weight_ED.to(x_TD.dtype))


def _switch(router: Router, inputs: Inputs) -> Routing:
    x_TD, gate = inputs.x_TD, router.gate
    if inputs.draws is not None and gate.jitter > 0:
        noise_TD = keyed.uniform(inputs.draws, router.layer, "jitter", x_TD.shape[1])
        x_TD = x_TD * (1 + gate.jitter * (2 * noise_TD - 1))
    return routing.switch(_logits(router.weight, x_TD), inputs.valid_T, inputs.chosen_TK)


def _gshard(router: Router, inputs: Inputs) -> Routing:
    uniform_T = None
    if inputs.draws is not None and router.gate.random_second:
        uniform_T = keyed.uniform(inputs.draws, router.layer, "second expert")
    logits_TE = _logits(router.weight, inputs.x_TD)
    return routing.gshard(logits_TE, inputs.valid_T, uniform_T, inputs.chosen_TK)


def _topk(router: Router, inputs: Inputs) -> Routing:
    gate, logits_TE = router.gate, _logits(router.weight, inputs.x_TD)
    return routing.topk(logits_TE, inputs.valid_T, gate.top_k, gate.renormalize, inputs.chosen_TK)


def _noisy_topk(router: Router, inputs: Inputs) -> Routing:
    clean_TE, raw_std_TE = (_logits(w, inputs.x_TD) for w in (router.weight, router.noise_weight))
    normal_TE = None
    if inputs.draws is not None:
        normal_TE = keyed.normal(inputs.draws, router.layer, "noise", router.num_experts)
    return routing.noisy_topk(
        clean_TE, raw_std_TE, inputs.valid_T, router.gate.top_k, normal_TE, inputs.chosen_TK
    )


def _sigmoid(router: Router, inputs: Inputs) -> Routing:
    gate, logits_TE = router.gate, _logits(router.weight, inputs.x_TD)
    return routing.sigmoid(
        logits_TE,
        router.bias,
        inputs.valid_T,
        gate.top_k,
        gate.scale,
        gate.groups,
        gate.top_groups,
        inputs.chosen_TK,
    )


def _hierarchical(router: Router, inputs: Inputs) -> Routing:
    gate = router.gate
    outer_TA, inner_TE = (_logits(w, inputs.x_TD) for w in (router.group_weight, router.weight))
    return routing.hierarchical(
        outer_TA,
        inner_TE,
        inputs.valid_T,
        gate.top_k,
        gate.top_groups,
        gate.renormalize,
        inputs.chosen_TK,
    )


def _expert_choice(router: Router, inputs: Inputs) -> Routing:
    if inputs.slots is None:
        raise ValueError("expert_choice needs a capacity: it is what the experts choose by")
    logits_TE = _logits(router.weight, inputs.x_TD)
    return routing.expert_choice(
        logits_TE, inputs.valid_T, inputs.group_size, inputs.slots, inputs.chosen_TK
    )


def _dense(router: Router, inputs: Inputs) -> Routing:
    return routing.dense(_logits(router.weight, inputs.x_TD), inputs.valid_T)


def _hash(router: Router, inputs: Inputs) -> Routing:
    """2106.04426: a fixed hash of the vocabulary id, another in every layer."""
    zero = torch.zeros((), dtype=torch.int64, device=inputs.x_TD.device)
    fixed = Draws(zero, _ids(router, inputs))
    return _ranked(router, inputs, keyed.uniform(fixed, router.layer, "hash", router.num_experts))


def _random(router: Router, inputs: Inputs) -> Routing:
    """Anew for every token and step; outside training a fixed hash of id and position."""
    draws = inputs.draws
    if draws is None:
        zero = torch.zeros((), dtype=torch.int64, device=inputs.x_TD.device)
        draws = Draws(zero, keyed.fold(_ids(router, inputs), inputs.position_T))
    return _ranked(router, inputs, keyed.uniform(draws, router.layer, "random", router.num_experts))


def _balanced(router: Router, inputs: Inputs) -> Routing:
    """Round robin over the experts, by position."""
    score_TE = routing.round_robin(inputs.position_T, router.num_experts, router.gate.top_k)
    return _ranked(router, inputs, score_TE)


def _ranked(router: Router, inputs: Inputs, score_TE: Tensor) -> Routing:
    """By given scores; the weights 1/k are as precise as those of the other gates."""
    return routing.ranked(score_TE.to(inputs.x_TD.dtype), inputs.valid_T, router.gate.top_k)


def _ids(router: Router, inputs: Inputs) -> Tensor:
    if inputs.token_T is None:
        raise ValueError(f"a {router.gate.name} gate needs the tokens' vocabulary ids (token_BL)")
    return inputs.token_T


ROUTES: dict[RouterName, Callable[[Router, Inputs], Routing]] = {
    "switch": _switch,
    "gshard": _gshard,
    "topk": _topk,
    "noisy_topk": _noisy_topk,
    "sigmoid": _sigmoid,
    "expert_choice": _expert_choice,
    "hash": _hash,
    "random": _random,
    "balanced": _balanced,
    "dense": _dense,
    "hierarchical": _hierarchical,
}
