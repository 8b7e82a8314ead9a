"""A mixture-of-experts layer as literally as Python can say it: the judge of the fast one.

One token at a time, one choice at a time, counting on fingers. Scalars and short vectors are fp64
torch tensors, so autograd supplies the gradients; nothing is batched, sorted on the device or
masked. It imports nothing of moetrain, and padding is *never read*, so whatever sits there cannot
matter. Gates stand in `oracle_gates`, losses in `oracle_losses`; here are capacity, who loses when
an expert is full, the ledger, and the layer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import torch
from oracle_gates import Heard, Router, Token, ask, half, scalar, take
from oracle_losses import balance, z_loss
from torch import Tensor

KEPT, SPILLED, DROPPED, NOT_SAMPLED = "kept", "spilled", "dropped", "not_sampled"


class Rules(NamedTuple):
    """Who may have a slot: `slots` per expert and group, None for as many as are asked for."""

    group_size: int
    slots: int | None = None
    policy: str = "position"
    depth: int = 1
    priority: Sequence[Sequence[float]] | None = None
    """random: a number for every token and choice; None ranks by position."""


class Verdict(NamedTuple):
    """What became of a choice: which expert computes it, at which weight, in which slot."""

    outcome: str
    expert: int | None = None
    gate: Tensor | None = None
    slot: int | None = None


class Expert(NamedTuple):
    """One SwiGLU expert: w1 and w3 are (D, F), w2 is (F, D)."""

    w1: Tensor
    w3: Tensor
    w2: Tensor


@dataclass
class Ledger:
    """Counts: `outcomes[expert chosen, choice rank, outcome]`, what was asked, rows per expert,
    valid tokens, tokens left with nothing, and the slots that experts provide to groups with a
    valid token (without a capacity just those that are filled). Gate weight asked for and lost."""

    outcomes: Counter[tuple[int, int, str]] = field(default_factory=Counter)
    assigned: int = 0
    rows: Counter[int] = field(default_factory=Counter)
    tokens: int = 0
    lost_tokens: int = 0
    slots: int = 0
    gate_mass: float = 0.0
    lost_mass: float = 0.0


@dataclass
class Answer:
    """All that the layer knows afterwards; tokens and verdicts are None for padding."""

    y: list[Tensor]
    tokens: list[Token | None]
    verdicts: list[list[Verdict] | None]
    balance: Tensor
    z: Tensor
    ledger: Ledger


# --- who gets a slot -------------------------------------------------------------------------


def capacity(group_size: int, experts: int, k: int, factor: float, min_capacity: int) -> int:
    """Slots per expert; the factor is the decimal number that was written, not its binary form."""
    demand = Fraction(str(factor)) * k * group_size / experts
    return min(group_size, max(min_capacity, math.ceil(demand)))


def judge(group: Sequence[Token | None], rules: Rules, start: int) -> list[list[Verdict] | None]:
    """One group, whose first token has the number `start`."""
    taken: Counter[int] = Counter()
    told: list[list[Verdict] | None] = [
        None if token is None else [Verdict(NOT_SAMPLED)] * len(token.choices) for token in group
    ]
    for t, rank in in_line(group, rules, start):
        token, verdicts = group[t], told[t]
        assert token is not None
        assert verdicts is not None
        choice = token.choices[rank]
        if rules.slots is not None and taken[choice.expert] == rules.slots:
            verdicts[rank] = Verdict(DROPPED)
        else:
            verdicts[rank] = Verdict(KEPT, choice.expert, choice.gate, taken[choice.expert])
            taken[choice.expert] += 1
    if rules.policy == "spill" and rules.slots is not None:
        spill(group, told, taken, rules.slots, rules.depth)
    return told


def in_line(group: Sequence[Token | None], rules: Rules, start: int) -> list[tuple[int, int]]:
    """The sampled choices as (token, rank): everybody's first choice in token order, then every
    second; where there are priorities the highest first, and that order among equals."""

    def priority(t: int, rank: int) -> float:
        token = group[t]
        if rules.policy == "probability" and token is not None:
            return half(token.choices[rank].gate.item())
        if rules.policy == "random" and rules.priority is not None:
            return rules.priority[start + t][rank]
        return 0.0

    asking = [
        (t, rank)
        for t, token in enumerate(group)
        if token is not None
        for rank, choice in enumerate(token.choices)
        if choice.sampled
    ]
    return sorted(asking, key=lambda place: (-priority(*place), place[1], place[0]))


def spill(
    group: Sequence[Token | None],
    told: list[list[Verdict] | None],
    taken: Counter[int],
    slots: int,
    depth: int,
) -> None:
    """Losers go on: choice by choice, in rounds, each to the next expert that it has not asked."""
    asked: list[set[int]] = [set() for _ in group]
    for rank in range(max((len(verdicts) for verdicts in told if verdicts), default=0)):
        for _ in range(depth):
            for t, (token, verdicts) in enumerate(zip(group, told, strict=True)):
                if token is None or verdicts is None or len(verdicts) <= rank:
                    continue
                if verdicts[rank].outcome != DROPPED:
                    continue
                own = {choice.expert for choice in token.choices}
                left = [e for e in token.ranking if e not in own and e not in asked[t]]
                if not left:
                    continue
                asked[t].add(left[0])
                if taken[left[0]] < slots:
                    taken[left[0]] += 1
                    verdicts[rank] = Verdict(SPILLED, left[0], spilled_gate(token, rank, left[0]))


def spilled_gate(token: Token, rank: int, expert: int) -> Tensor:
    """The gate that was lost, less as much as the new expert is less probable than the lost one."""
    lost = token.choices[rank]
    old, new = token.probs[lost.expert], token.probs[expert]
    return lost.gate * new / old if new <= old else lost.gate


# --- the ledger ------------------------------------------------------------------------------


def count(ledger: Ledger, token: Token, verdicts: list[Verdict]) -> None:
    """Enter one valid token."""
    ledger.tokens += 1
    ledger.lost_tokens += all(verdict.expert is None for verdict in verdicts)
    for rank, (choice, verdict) in enumerate(zip(token.choices, verdicts, strict=True)):
        ledger.assigned += 1
        ledger.outcomes[choice.expert, rank, verdict.outcome] += 1
        if verdict.expert is not None:
            ledger.rows[verdict.expert] += 1
        if choice.sampled:
            ledger.gate_mass += choice.gate.item()
        if verdict.outcome == DROPPED:
            ledger.lost_mass += choice.gate.item()


def filled(verdicts: list[list[Verdict] | None]) -> int:
    """Choices that an expert computes."""
    return sum(verdict.expert is not None for told in verdicts if told for verdict in told)


# --- experts and the whole layer -------------------------------------------------------------


def run_expert(expert: Expert, x: Tensor) -> Tensor:
    """SwiGLU of one token: W2(silu(W1 x) · (W3 x)), weights applied from the right."""
    a = x @ expert.w1
    return (a / (1 + torch.exp(-a)) * (x @ expert.w3)) @ expert.w2


def combine(x: Tensor, verdicts: list[Verdict], experts: list[Expert]) -> Tensor:
    """Gate times expert, summed over what found an expert; zero where nothing did."""
    y = torch.zeros_like(x)
    for verdict in verdicts:
        if verdict.expert is not None and verdict.gate is not None:
            y = y + verdict.gate * run_expert(experts[verdict.expert], x)
    return y


def route(router: Router, heard: Sequence[Heard | None], rules: Rules) -> Answer:
    """Everything but the experts; `y` stays empty, and None is padding.

    `balance` is summed over groups with a valid token, `z` over valid tokens.
    """
    answer = Answer([], [], [], scalar(0.0), scalar(0.0), Ledger())
    for start in range(0, len(heard), rules.group_size):
        group = [
            None if one is None else ask(router, one)
            for one in heard[start : start + rules.group_size]
        ]
        if router.kind == "expert_choice":
            assert rules.slots is not None
            take(group, rules.slots)
        verdicts = judge(group, rules, start)
        valid = [token for token in group if token is not None]
        if valid:
            answer.balance = answer.balance + balance(router, valid)
            provided = None if rules.slots is None else len(valid[0].probs) * rules.slots
            answer.ledger.slots += filled(verdicts) if provided is None else provided
        for token, told in zip(group, verdicts, strict=True):
            if token is not None and told is not None:
                answer.z = answer.z + z_loss(token)
                count(answer.ledger, token, told)
        answer.tokens += group
        answer.verdicts += verdicts
    return answer


def layer(
    router: Router,
    x: Tensor,
    heard: Sequence[Heard | None],
    experts: list[Expert],
    rules: Rules,
) -> Answer:
    """The layer on x (T, D), with what the gate heard of each token. Padding comes out as zero."""
    answer = route(router, heard, rules)
    for t, verdicts in enumerate(answer.verdicts):
        nothing = torch.zeros_like(x[t])
        answer.y.append(nothing if verdicts is None else combine(x[t], verdicts, experts))
    return answer
