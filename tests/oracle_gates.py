"""Gates as literally as Python can say them: what one token asks for, one expert at a time.

Scalars are fp64 torch tensors, so autograd supplies the gradients; nothing is batched, masked or
sorted on the device, and nothing of moetrain is imported. Sources: Switch (2101.03961), GShard
(2006.16668, Algorithm 1), noisy top-k and two levels (1701.06538), DeepSeek-V3 (2412.19437),
expert choice (2202.09368).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Choice(NamedTuple):
    """What one token asks of one expert; `gate` is a differentiable scalar."""

    expert: int
    gate: Tensor
    sampled: bool = True


@dataclass(frozen=True)
class Router:
    """Which gate, how many choices, and what else the gate is told."""

    kind: str
    k: int
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1


@dataclass
class Heard:
    """What a gate is given of one token: numbers of the router, draws, and what is fixed."""

    logits: Tensor
    """(E,); of a gate without a router only the length is read."""
    outer: Tensor | None = None
    """hierarchical: (groups,)."""
    raw_std: Tensor | None = None
    """noisy_topk: (E,), before softplus."""
    normal: Sequence[float] | None = None
    """noisy_topk: a draw for every expert; None for no noise."""
    uniform: float | None = None
    """gshard: a draw; None to sample nothing."""
    bias: Sequence[float] = ()
    """sigmoid: a number for every expert."""
    score: Sequence[float] = ()
    """hash, random: a number for every expert."""
    position: int = 0
    """balanced: place in the sequence."""


@dataclass
class Token:
    """What a gate says of one token."""

    choices: list[Choice]
    probs: list[Tensor]
    """What balance is measured by."""
    logits: list[Tensor]
    """What the z-loss sees."""
    ranking: list[int]
    """Experts that may be chosen, best first."""
    load: list[Tensor] = field(default_factory=list)
    """noisy_topk: the chance of each expert to be chosen with other noise."""
    outer: list[Tensor] = field(default_factory=list)
    inner: list[Tensor] = field(default_factory=list)
    """hierarchical: probabilities of the groups, and of every expert inside its group."""


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def add(values: Sequence[Tensor]) -> Tensor:
    """Their sum, one after the other."""
    total = scalar(0.0)
    for value in values:
        total = total + value
    return total


def softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    """Probabilities, one scalar per expert."""
    top = max(logit.item() for logit in logits)
    powers = [torch.exp(logit - top) for logit in logits]
    total = add(powers)
    return [power / total for power in powers]


def best_first(scores: Sequence[float]) -> list[int]:
    """Indices from the highest score to the lowest; of equal ones the lower index first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def numbers(values: Sequence[Tensor]) -> list[float]:
    return [value.item() for value in values]


def ask(router: Router, heard: Heard) -> Token:
    """The token's choices, best first. Those of `expert_choice` are made by `take`."""
    return GATES[router.kind](router, heard)


def _switch(_router: Router, heard: Heard) -> Token:
    probs = softmax(list(heard.logits))
    ranking = best_first(numbers(probs))
    return Token([Choice(ranking[0], probs[ranking[0]])], probs, list(heard.logits), ranking)


def _topk(router: Router, heard: Heard) -> Token:
    probs = softmax(list(heard.logits))
    ranking = best_first(numbers(probs))
    chosen = ranking[: router.k]
    total = add([probs[e] for e in chosen]) if router.renormalize else 1.0
    choices = [Choice(e, probs[e] / total) for e in chosen]
    return Token(choices, probs, list(heard.logits), ranking)


def _gshard(_router: Router, heard: Heard) -> Token:
    """Both gates are divided by g1 + g2 at once, and drops never change that again."""
    probs = softmax(list(heard.logits))
    ranking = best_first(numbers(probs))
    first, second = ranking[:2]
    both = probs[first] + probs[second]
    g1, g2 = probs[first] / both, probs[second] / both
    sampled = heard.uniform is None or heard.uniform < min(1.0, 2.0 * g2.item())
    choices = [Choice(first, g1), Choice(second, g2, sampled)]
    return Token(choices, probs, list(heard.logits), ranking)


def _noisy_topk(router: Router, heard: Heard) -> Token:
    """Gates are a softmax over the k best noisy logits alone."""
    assert heard.raw_std is not None
    clean, k = list(heard.logits), router.k
    std = [torch.log(1 + torch.exp(raw)) for raw in heard.raw_std]
    noise = [0.0] * len(clean) if heard.normal is None else heard.normal
    noisy = [c + n * s for c, n, s in zip(clean, noise, std, strict=True)]
    ranking = best_first(numbers(noisy))
    gates = softmax([noisy[e] for e in ranking[:k]])
    choices = [Choice(e, gate) for e, gate in zip(ranking[:k], gates, strict=True)]
    load = []
    for e in range(len(clean)):
        others = [noisy[other] for other in ranking if other != e]
        won = 1 if len(others) < k else _phi((clean[e] - others[k - 1]) / std[e])
        load.append(won + scalar(0.0))
    return Token(choices, softmax(noisy), noisy, ranking, load=load)


def _phi(z: Tensor) -> Tensor:
    """The distribution function of the standard normal."""
    return (1 + torch.erf(z / math.sqrt(2))) / 2


def _sigmoid(router: Router, heard: Heard) -> Token:
    """The bias takes part in the choice, never in the weight."""
    scores = [1 / (1 + torch.exp(-logit)) for logit in heard.logits]
    biased = [s + b for s, b in zip(numbers(scores), heard.bias, strict=True)]
    allowed = _open_experts(biased, router)
    ranking = [e for e in best_first(biased) if e in allowed]
    chosen = ranking[: router.k]
    total = add([scores[e] for e in chosen])
    choices = [Choice(e, router.scale * (scores[e] / total)) for e in chosen]
    every = add(scores)
    return Token(choices, [s / every for s in scores], list(heard.logits), ranking)


def _open_experts(scores: list[float], router: Router) -> set[int]:
    """The experts of the best groups, by the sum of each group's best scores."""
    size = len(scores) // router.groups
    members = [list(range(a * size, (a + 1) * size)) for a in range(router.groups)]
    best = router.k // router.top_groups
    strength = [sum(sorted((scores[e] for e in group), reverse=True)[:best]) for group in members]
    return {e for a in best_first(strength)[: router.top_groups] for e in members[a]}


def _hierarchical(router: Router, heard: Heard) -> Token:
    """A gate over groups, one inside each group, and the product of the two as weight."""
    assert heard.outer is not None
    size, per_group = len(heard.logits) // router.groups, router.k // router.top_groups
    outer = softmax(list(heard.outer))
    inner: list[Tensor] = []
    for a in range(router.groups):
        inner += softmax(list(heard.logits[a * size : (a + 1) * size]))
    groups = best_first(numbers(outer))[: router.top_groups]
    outer_total = add([outer[a] for a in groups]) if router.renormalize else 1.0
    choices = []
    for a in groups:
        within = best_first(numbers(inner[a * size : (a + 1) * size]))[:per_group]
        chosen = [a * size + place for place in within]
        inner_total = add([inner[e] for e in chosen]) if router.renormalize else 1.0
        choices += [Choice(e, outer[a] / outer_total * (inner[e] / inner_total)) for e in chosen]
    choices.sort(key=lambda choice: (-choice.gate.item(), choice.expert))
    probs = [outer[e // size] * inner[e] for e in range(len(inner))]
    logits = [heard.outer[e // size] + heard.logits[e] for e in range(len(inner))]
    return Token(choices, probs, logits, best_first(numbers(probs)), outer=outer, inner=inner)


def _dense(_router: Router, heard: Heard) -> Token:
    probs = softmax(list(heard.logits))
    choices = [Choice(e, prob) for e, prob in enumerate(probs)]
    return Token(choices, probs, list(heard.logits), best_first(numbers(probs)))


def _expert_choice(_router: Router, heard: Heard) -> Token:
    probs = softmax(list(heard.logits))
    return Token([], probs, list(heard.logits), best_first(numbers(probs)))


def half(weight: float) -> float:
    """A weight in fp32, as tokens are compared: equal but for rounding is equal."""
    return struct.unpack("f", struct.pack("f", weight))[0]


def take(group: Sequence[Token | None], slots: int) -> None:
    """expert_choice: every expert takes the tokens of a group that want it most."""
    tokens = [token for token in group if token is not None]
    for e in range(len(tokens[0].probs) if tokens else 0):
        for t in best_first([half(token.probs[e].item()) for token in tokens])[:slots]:
            tokens[t].choices.append(Choice(e, tokens[t].probs[e]))
    for token in tokens:
        token.choices.sort(key=lambda choice: (-choice.gate.item(), choice.expert))


def _without_router(ranking: list[int], k: int) -> Token:
    experts = len(ranking)
    choices = [Choice(e, scalar(1 / k)) for e in ranking[:k]]
    even, flat = [scalar(1 / experts)] * experts, [scalar(-math.log(experts))] * experts
    return Token(choices, even, flat, ranking)


def _by_score(router: Router, heard: Heard) -> Token:
    return _without_router(best_first(heard.score), router.k)


def _balanced(router: Router, heard: Heard) -> Token:
    """Round robin: position p asks for experts p·k, p·k + 1, ..."""
    experts, first = len(heard.logits), heard.position * router.k
    return _without_router([(first + j) % experts for j in range(experts)], router.k)


GATES = {
    "switch": _switch,
    "gshard": _gshard,
    "topk": _topk,
    "noisy_topk": _noisy_topk,
    "sigmoid": _sigmoid,
    "expert_choice": _expert_choice,
    "hash": _by_score,
    "random": _by_score,
    "balanced": _balanced,
    "dense": _dense,
    "hierarchical": _hierarchical,
}
