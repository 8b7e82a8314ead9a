"""Small layers for hypothesis to draw: every router, ties, padding anywhere, experts left empty.

A `Case` can be answered twice: by the oracle, and by the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass

import oracle
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.moe import Plan, Routing, routing
from moetrain.moe.capacity import plan_capacity, plan_dropless

MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

KINDS = ("switch", "gshard", "topk")
FACTORS = (0.1, 0.5, 0.75, 1.0, 1.1, 1.25, 2.0, 9.0)


@dataclass(frozen=True)
class Case:
    """The shape of one layer, which tokens are real, and the seed of its numbers."""

    router: oracle.Router
    experts: int
    groups: int
    group_size: int
    valid: tuple[bool, ...]
    uniforms: tuple[float, ...] | None
    factor: float | None
    min_capacity: int
    tied: bool
    seed: int

    @property
    def tokens(self) -> int:
        return self.groups * self.group_size

    @property
    def slots(self) -> int | None:
        if self.factor is None:
            return None
        shape = (self.group_size, self.experts, self.router.k)
        return oracle.capacity(*shape, self.factor, self.min_capacity)

    def numbers(self, *shape: int, stream: int = 0) -> Tensor:
        """Fp64 normals; where ties are wanted, integers from -1 to 1, whose sums are exact."""
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        if self.tied:
            return torch.randint(-1, 2, shape, generator=generator).double()
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def logits(self) -> Tensor:
        """(T, E), a leaf that wants a gradient."""
        return self.numbers(self.tokens, self.experts).requires_grad_()

    def mask(self) -> Tensor:
        return torch.tensor(self.valid)

    def route(self, logits_TE: Tensor) -> Routing:
        """The routing of the code under test."""
        uniform_T = (
            None if self.uniforms is None else torch.tensor(self.uniforms, dtype=torch.float64)
        )
        return route(self.router, logits_TE, self.mask(), uniform_T)

    def plan(self, record: Routing) -> Plan:
        """The plan of the code under test."""
        if self.slots is None:
            return plan_dropless(record)
        return plan_capacity(record, self.group_size, self.slots)

    def answer(self, logits_TE: Tensor) -> oracle.Answer:
        """What the oracle says of the same tokens."""
        logits = list(logits_TE)
        return oracle.route(
            self.router, logits, self.valid, self.group_size, self.slots, self.uniforms
        )


def route(
    router: oracle.Router, logits_TE: Tensor, valid_T: Tensor, uniform_T: Tensor | None = None
) -> Routing:
    """Call the gate under test by the oracle's name for it."""
    if router.kind == "switch":
        return routing.switch(logits_TE, valid_T)
    if router.kind == "gshard":
        return routing.gshard(logits_TE, valid_T, uniform_T)
    return routing.topk(logits_TE, valid_T, router.k, router.renormalize)


def asking(choices: list[tuple[int, ...]], experts: int) -> Tensor:
    """Logits (T, E) with which every token asks for the experts listed, in that order."""
    logits_TE = torch.zeros(len(choices), experts, dtype=torch.float64)
    for token, wanted in enumerate(choices):
        for rank, expert in enumerate(wanted):
            logits_TE[token, expert] = len(wanted) - rank
    return logits_TE


def close(actual: Tensor, expected: Tensor | float) -> None:
    """Equal up to the rounding of fp64."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a scalar, zero where it does not depend on a leaf."""
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(value, leaves, materialize_grads=True))


@st.composite
def routers(draw: st.DrawFn, experts: int, kind: str | None = None) -> oracle.Router:
    kinds = KINDS if experts > 1 else ("switch", "topk")
    kind = kind or draw(st.sampled_from(kinds))
    if kind == "topk":
        return oracle.Router(kind, draw(st.integers(1, experts)), draw(st.booleans()))
    return oracle.Router(kind, {"switch": 1, "gshard": 2}[kind])


@st.composite
def padding(draw: st.DrawFn, groups: int, group_size: int) -> tuple[bool, ...]:
    """Valid flags: any pattern at all, with whole groups of padding made likely."""
    valid: list[bool] = []
    for _ in range(groups):
        pattern = draw(st.sampled_from(["full", "empty", "tail", "any"]))
        if pattern == "any":
            valid += draw(st.lists(st.booleans(), min_size=group_size, max_size=group_size))
        else:
            real = {"full": group_size, "empty": 0}.get(pattern, group_size // 2)
            valid += [i < real for i in range(group_size)]
    return tuple(valid)


@st.composite
def cases(draw: st.DrawFn, kind: str | None = None, dropless: bool | None = None) -> Case:
    """Any small layer; `kind` and `dropless` pin the router and whether there is a capacity."""
    experts = draw(st.integers(2 if kind == "gshard" else 1, 8))
    groups, group_size = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    router = draw(routers(experts, kind))
    tokens = groups * group_size
    draws = st.lists(st.floats(0, 1, exclude_max=True), min_size=tokens, max_size=tokens)
    dropless = draw(st.booleans()) if dropless is None else dropless
    return Case(
        router=router,
        experts=experts,
        groups=groups,
        group_size=group_size,
        valid=draw(padding(groups, group_size)),
        uniforms=tuple(draw(draws)) if router.kind == "gshard" and draw(st.booleans()) else None,
        factor=None if dropless else draw(st.sampled_from(FACTORS)),
        min_capacity=draw(st.integers(1, 4)),
        tied=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )
