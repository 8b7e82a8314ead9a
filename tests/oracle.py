"""A mixture-of-experts layer as literally as Python can say it: the judge of the fast one.

One token at a time, one choice at a time, counting on fingers. Scalars and short vectors are fp64
torch tensors, so autograd supplies the gradients; nothing is batched, sorted on the device or
masked. It imports nothing of moetrain, and padding is *never read*, so whatever sits there cannot
matter. Choices, capacity, drops, losses and the ledger are the definitions of the project:
GShard (2006.16668, Algorithm 1), Switch (2101.03961), ST-MoE (2202.08906).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

KEPT, DROPPED, NOT_SAMPLED = "kept", "dropped", "not_sampled"


class Choice(NamedTuple):
    """What one token asks of one expert; `gate` is a differentiable scalar."""

    expert: int
    gate: Tensor
    sampled: bool


class Verdict(NamedTuple):
    """What became of a choice; `slot` is its place at the expert, None without one."""

    outcome: str
    slot: int | None


class Expert(NamedTuple):
    """One SwiGLU expert: w1 and w3 are (D, F), w2 is (F, D)."""

    w1: Tensor
    w3: Tensor
    w2: Tensor


@dataclass(frozen=True)
class Router:
    """Which gate, how many choices, and whether `topk` renormalises."""

    kind: str
    k: int
    renormalize: bool = True


@dataclass
class Ledger:
    """Counts: `outcomes[expert, choice rank, outcome]`, valid tokens, tokens left with nothing,
    and the slots that experts provide to groups with a valid token: without a capacity, just those
    that are filled."""

    outcomes: Counter[tuple[int, int, str]] = field(default_factory=Counter)
    tokens: int = 0
    lost_tokens: int = 0
    slots: int = 0


@dataclass
class Answer:
    """All that the layer knows afterwards; index `choices` and `verdicts` by token, then rank."""

    y: list[Tensor]
    choices: list[list[Choice] | None]
    verdicts: list[list[Verdict] | None]
    balance: Tensor
    z: Tensor
    ledger: Ledger


# --- gates -----------------------------------------------------------------------------------


def softmax(logits: Tensor) -> list[Tensor]:
    """Probabilities of one token's logits, one scalar per expert."""
    top = max(logit.item() for logit in logits)
    powers = [torch.exp(logit - top) for logit in logits]
    return [power / sum(powers) for power in powers]


def best_first(scores: Sequence[Tensor]) -> list[int]:
    """Experts from the highest score to the lowest; of equal ones the lower index first."""
    return sorted(range(len(scores)), key=lambda expert: (-scores[expert].item(), expert))


def choose(router: Router, probs: list[Tensor], uniform: float | None) -> list[Choice]:
    """The choices of one token, best first. `uniform` is its draw; None samples nothing."""
    if router.kind == "switch":
        expert = best_first(probs)[0]
        return [Choice(expert, probs[expert], True)]
    if router.kind == "gshard":
        return choose_gshard(probs, uniform)
    experts = best_first(probs)[: router.k]
    total = sum(probs[expert] for expert in experts) if router.renormalize else 1.0
    return [Choice(expert, probs[expert] / total, True) for expert in experts]


def choose_gshard(probs: list[Tensor], uniform: float | None) -> list[Choice]:
    """Algorithm 1: both gates are divided by g1+g2 at once, and drops never change that again."""
    first, second = best_first(probs)[:2]
    both = probs[first] + probs[second]
    g1, g2 = probs[first] / both, probs[second] / both
    sampled = uniform is None or uniform < min(1.0, 2.0 * g2.item())
    return [Choice(first, g1, True), Choice(second, g2, sampled)]


# --- capacity --------------------------------------------------------------------------------


def capacity(group_size: int, experts: int, k: int, factor: float, min_capacity: int) -> int:
    """Slots per expert; the factor is the decimal number that was written, not its binary form."""
    demand = Fraction(str(factor)) * k * group_size / experts
    return min(group_size, max(min_capacity, math.ceil(demand)))


def judge(choices: list[list[Choice] | None], slots: int | None) -> list[list[Verdict] | None]:
    """One group: everybody's first choice in token order, then every second choice, and so on."""
    taken: Counter[int] = Counter()
    verdicts: list[list[Verdict] | None] = [None if c is None else [] for c in choices]
    ranks = max((len(c) for c in choices if c is not None), default=0)
    for rank in range(ranks):
        for asked, told in zip(choices, verdicts, strict=True):
            if asked is None or told is None:
                continue
            expert = asked[rank].expert
            if not asked[rank].sampled:
                told.append(Verdict(NOT_SAMPLED, None))
            elif slots is not None and taken[expert] == slots:
                told.append(Verdict(DROPPED, None))
            else:
                told.append(Verdict(KEPT, taken[expert]))
                taken[expert] += 1
    return verdicts


# --- losses ----------------------------------------------------------------------------------


def balance(router: Router, probs: list[list[Tensor]], choices: list[list[Choice]]) -> Tensor:
    """Balance loss of the valid tokens of one group: 1 when every expert is asked equally often.

    Counts are of what tokens asked for, before any capacity: first choices for gshard, else all.
    """
    ranks = 1 if router.kind == "gshard" else router.k
    experts, tokens = len(probs[0]), len(probs)
    asked = Counter(choice.expert for token in choices for choice in token[:ranks])
    total = torch.zeros((), dtype=torch.float64)
    for expert in range(experts):
        mean_prob = sum(p[expert] for p in probs) / tokens
        total = total + asked[expert] / (tokens * ranks) * mean_prob
    return experts * total


def z_loss(logits: Tensor) -> Tensor:
    """Squared log of the sum of exponentials of one token's logits."""
    top = max(logit.item() for logit in logits)
    return (top + torch.log(sum(torch.exp(logit - top) for logit in logits))) ** 2  # type: ignore


# --- experts and the whole layer -------------------------------------------------------------


def run_expert(expert: Expert, x: Tensor) -> Tensor:
    """SwiGLU of one token: W2(silu(W1 x) · (W3 x)), weights applied from the right."""
    a = x @ expert.w1
    return (a / (1 + torch.exp(-a)) * (x @ expert.w3)) @ expert.w2


def combine(
    x: Tensor, choices: list[Choice], verdicts: list[Verdict], experts: list[Expert]
) -> Tensor:
    """Gate times expert, summed over the kept choices; zero where nothing was kept."""
    y = torch.zeros_like(x)
    for choice, verdict in zip(choices, verdicts, strict=True):
        if verdict.outcome == KEPT:
            y = y + choice.gate * run_expert(experts[choice.expert], x)
    return y


def count(ledger: Ledger, choices: list[Choice], verdicts: list[Verdict]) -> None:
    """Enter one valid token in the ledger."""
    ledger.tokens += 1
    ledger.lost_tokens += all(verdict.outcome != KEPT for verdict in verdicts)
    for rank, (choice, verdict) in enumerate(zip(choices, verdicts, strict=True)):
        ledger.outcomes[choice.expert, rank, verdict.outcome] += 1


def filled(verdicts: list[list[Verdict] | None]) -> int:
    """Choices with a slot."""
    return sum(verdict.slot is not None for told in verdicts if told for verdict in told)


def route(
    router: Router,
    logits: list[Tensor],
    valid: Sequence[bool],
    group_size: int,
    slots: int | None,
    uniforms: Sequence[float] | None = None,
) -> Answer:
    """Everything but the experts, from logits (one fp64 vector per token); `y` stays empty.

    `slots` per expert and group, None for dropless. `uniforms`: one draw per token, None to
    sample nothing. `balance` is summed over groups with a valid token, `z` over valid tokens.
    """
    zero = torch.zeros((), dtype=torch.float64)
    answer = Answer([], [], [], zero, zero, Ledger())
    for start in range(0, len(logits), group_size):
        probs: list[list[Tensor]] = []
        choices: list[list[Choice] | None] = []
        for t in range(start, start + group_size):
            if not valid[t]:
                choices.append(None)
                continue
            probs.append(softmax(logits[t]))
            choices.append(choose(router, probs[-1], None if uniforms is None else uniforms[t]))
            answer.z = answer.z + z_loss(logits[t])
        verdicts = judge(choices, slots)
        asked = [token for token in choices if token is not None]
        if asked:
            answer.balance = answer.balance + balance(router, probs, asked)
            answer.ledger.slots += len(probs[0]) * slots if slots is not None else filled(verdicts)
        for token, told in zip(choices, verdicts, strict=True):
            if token is not None and told is not None:
                count(answer.ledger, token, told)
        answer.choices += choices
        answer.verdicts += verdicts
    return answer


def layer(
    router: Router,
    x: Tensor,
    router_weight: Tensor,
    experts: list[Expert],
    valid: Sequence[bool],
    group_size: int,
    slots: int | None,
    *,
    uniforms: Sequence[float] | None = None,
    shared: Sequence[Expert] = (),
    jitter: Tensor | None = None,
) -> Answer:
    """The layer: x (T, D), router_weight (D, E). Padded tokens come out as zero.

    `jitter` (T, D), where given, multiplies what the router sees and nothing else.
    """
    seen = x if jitter is None else x * jitter
    logits = [seen[t] @ router_weight for t in range(len(x))]
    answer = route(router, logits, valid, group_size, slots, uniforms)
    for t, (choices, verdicts) in enumerate(zip(answer.choices, answer.verdicts, strict=True)):
        y = torch.zeros_like(x[t])
        if choices is not None and verdicts is not None:
            y = combine(x[t], choices, verdicts, experts)
            for expert in shared:
                y = y + run_expert(expert, x[t])
        answer.y.append(y)
    return answer
