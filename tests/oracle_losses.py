"""Losses on the router as literally as Python can say them: sums over tokens, counted on fingers.

Counts are of what tokens asked for, before any capacity, sampled or not. Every balance loss is 1
when all experts are asked equally often and equally likely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from oracle_gates import Router, Token, add, scalar
from torch import Tensor


def balance(router: Router, tokens: Sequence[Token]) -> Tensor:
    """The balance loss of one set of valid tokens: a routing group, or a whole batch."""
    if not tokens:
        return scalar(0.0)
    if router.kind == "noisy_topk":
        return _variations(tokens)
    if router.kind == "hierarchical":
        return _two_levels(router, tokens)
    ranks = 1 if router.kind == "gshard" else None
    asked = Counter(choice.expert for token in tokens for choice in token.choices[:ranks])
    return _match(asked, [token.probs for token in tokens])


def _match(asked: Counter[int], probs: Sequence[Sequence[Tensor]]) -> Tensor:
    """n times the sum over n options of their share of choices times their mean probability."""
    options, total = len(probs[0]), sum(asked.values())
    terms = [
        asked[option] / total * (add([p[option] for p in probs]) / len(probs))
        for option in range(options)
    ]
    return options * add(terms)


def _variations(tokens: Sequence[Token]) -> Tensor:
    """1 + squared coefficients of variation of importance and load."""
    experts = len(tokens[0].probs)
    gates = [
        add([choice.gate for token in tokens for choice in token.choices if choice.expert == e])
        for e in range(experts)
    ]
    loads = [add([token.load[e] for token in tokens]) for e in range(experts)]
    return 1 + _squared_cv(gates) + _squared_cv(loads)


def _squared_cv(values: Sequence[Tensor]) -> Tensor:
    mean = add(values) / len(values)
    return add([(value - mean) ** 2 for value in values]) / len(values) / mean**2


def _two_levels(router: Router, tokens: Sequence[Token]) -> Tensor:
    """The mean of the loss over groups, and the mean loss inside the groups that somebody chose."""
    size = len(tokens[0].probs) // router.groups
    asked_groups = Counter(c.expert // size for token in tokens for c in token.choices)
    outer = _match(asked_groups, [token.outer for token in tokens])
    inside = []
    for a in sorted(asked_groups):
        here = [t for t in tokens if any(c.expert // size == a for c in t.choices)]
        asked = Counter(c.expert % size for t in here for c in t.choices if c.expert // size == a)
        inside.append(_match(asked, [t.inner[a * size : (a + 1) * size] for t in here]))
    return (outer + add(inside) / len(inside)) / 2


def z_loss(token: Token) -> Tensor:
    """Squared log of the sum of exponentials of one token's logits."""
    top = max(logit.item() for logit in token.logits)
    return (top + torch.log(add([torch.exp(logit - top) for logit in token.logits]))) ** 2
