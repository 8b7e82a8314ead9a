"""Small layers for hypothesis to draw: every gate and drop policy, ties, padding anywhere.

A `Case` can be answered twice: by the oracle, and by the code under test.

Where ties are wanted, tokens are copies of two, and rows of the router's weights are unit vectors:
logits are then copies of a few numbers, so equal ones are equal in every bit on both sides, and no
two differ by rounding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import oracle
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from oracle_gates import Heard, Router
from torch import Tensor

from moetrain.moe import Gate, Plan, Routing, routing
from moetrain.moe.capacity import plan_capacity, plan_dropless
from moetrain.moe.ledger import Ledger, ledger
from moetrain.moe.spill import spill

MANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

DIM = 3
GATES = (
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
)
POLICIES = ("position", "probability", "random", "spill")
FACTORS = (0.1, 0.5, 0.75, 1.0, 1.1, 1.25, 2.0, 9.0)


class Given(NamedTuple):
    """What gates and drop policies are told beside the router's numbers; None: no draw."""

    uniform_T: Tensor | None
    """gshard."""
    normal_TE: Tensor | None
    """noisy_topk."""
    score_TE: Tensor
    """hash, random."""
    priority_TK: Tensor | None
    """Drop policy random."""
    bias_E: Tensor
    """sigmoid."""
    position_T: Tensor
    """balanced."""


def listen(
    router: Router, leaves: dict[str, Tensor], valid: Sequence[bool], given: Given
) -> list[Heard | None]:
    """What the oracle's gate is given of every token, by the names that a router's leaves have."""

    def one(t: int) -> Heard:
        outer, raw = leaves.get("group_weight"), leaves.get("noise_weight")
        return Heard(
            logits=leaves["weight"][t],
            outer=None if outer is None else outer[t],
            raw_std=None if raw is None else raw[t],
            normal=None if given.normal_TE is None else given.normal_TE[t].tolist(),
            uniform=None if given.uniform_T is None else given.uniform_T[t].item(),
            bias=given.bias_E.tolist(),
            score=given.score_TE[t].tolist(),
            position=int(given.position_T[t]),
        )

    return [one(t) if real else None for t, real in enumerate(valid)]


def route(
    router: Router,
    leaves: dict[str, Tensor],
    valid_T: Tensor,
    given: Given,
    group_size: int,
    slots: int | None,
) -> Routing:
    """Call the gate under test by its name; `leaves` are logits by the name of their weight."""
    logits_TE, k = leaves["weight"], router.k
    match router.kind:
        case "switch":
            return routing.switch(logits_TE, valid_T)
        case "gshard":
            return routing.gshard(logits_TE, valid_T, given.uniform_T)
        case "topk":
            return routing.topk(logits_TE, valid_T, k, router.renormalize)
        case "noisy_topk":
            raw_TE = leaves["noise_weight"]
            return routing.noisy_topk(logits_TE, raw_TE, valid_T, k, given.normal_TE)
        case "sigmoid":
            limits = router.scale, router.groups, router.top_groups
            return routing.sigmoid(logits_TE, given.bias_E, valid_T, k, *limits)
        case "hierarchical":
            limits = k, router.top_groups, router.renormalize
            return routing.hierarchical(leaves["group_weight"], logits_TE, valid_T, *limits)
        case "expert_choice":
            assert slots is not None
            return routing.expert_choice(logits_TE, valid_T, group_size, slots)
        case "dense":
            return routing.dense(logits_TE, valid_T)
        case "balanced":
            score_TE = routing.round_robin(given.position_T, logits_TE.shape[1], k)
            return routing.ranked(score_TE.double(), valid_T, k)
        case _:
            return routing.ranked(given.score_TE, valid_T, k)


def gate_of(router: Router, **options: float) -> Gate:
    """The settings under test for the oracle's."""
    return Gate(
        router.kind,  # type: ignore[arg-type]
        router.k,
        router.renormalize,
        scale=router.scale,
        groups=router.groups,
        top_groups=router.top_groups,
        **options,  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class Case:
    """The shape of one layer, which tokens are real, and the seed of its numbers."""

    router: Router
    experts: int
    groups: int
    group_size: int
    valid: tuple[bool, ...]
    drawn: bool
    """Whether what may be random is."""
    factor: float | None
    min_capacity: int
    policy: str
    depth: int
    tied: bool
    seed: int

    @property
    def tokens(self) -> int:
        return self.groups * self.group_size

    @property
    def columns(self) -> int:
        """Choices that a record has room for."""
        return self.experts if self.router.kind == "expert_choice" else self.router.k

    @property
    def slots(self) -> int | None:
        if self.factor is None:
            return None
        shape = (self.group_size, self.experts, self.router.k)
        return oracle.capacity(*shape, self.factor, self.min_capacity)

    @property
    def gate(self) -> Gate:
        return gate_of(self.router)

    def rules(self, given: Given) -> oracle.Rules:
        priority = None if given.priority_TK is None else given.priority_TK.tolist()
        return oracle.Rules(self.group_size, self.slots, self.policy, self.depth, priority)

    # ---- numbers

    def normals(self, *shape: int, stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniforms(self, *shape: int, stream: int) -> Tensor:
        """Multiples of 1/4 where ties are wanted."""
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        if self.tied:
            return torch.randint(0, 4, shape, generator=generator).double() / 4
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def picks(self, size: int, options: int, stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        return torch.randint(0, options, (size,), generator=generator)

    def x(self) -> Tensor:
        """(T, D)."""
        if self.tied:
            return coarse(self.normals(2, DIM, stream=1))[self.picks(self.tokens, 2, stream=2)]
        return coarse(self.normals(self.tokens, DIM, stream=1))

    def weights(self) -> dict[str, Tensor]:
        """The router's, by parameter name. Two levels tie at one alone: ties of products round."""
        shapes = {"weight": self.experts}
        if self.router.kind == "noisy_topk":
            shapes["noise_weight"] = self.experts
        tied = {"weight", "noise_weight", "group_weight"}
        if self.router.kind == "hierarchical":
            shapes["group_weight"] = self.router.groups
            tied = {"weight" if self.seed % 2 else "group_weight"}
        return {
            name: torch.eye(DIM, dtype=torch.float64)[self.picks(rows, DIM, stream=3 + stream)]
            if self.tied and name in tied
            else coarse(self.normals(rows, DIM, stream=3 + stream))
            for stream, (name, rows) in enumerate(shapes.items())
        }

    def leaves(self) -> dict[str, Tensor]:
        """Logits by the name of their weight; leaves that want a gradient."""
        x_TD = self.x()
        return {name: (x_TD @ w.T).requires_grad_() for name, w in self.weights().items()}

    def given(self) -> Given:
        shape = self.tokens, self.experts
        bias_E = torch.zeros(self.experts, dtype=torch.float64)
        return Given(
            uniform_T=self.uniforms(self.tokens, stream=7) if self.drawn else None,
            normal_TE=self.normals(*shape, stream=8) if self.drawn else None,
            score_TE=self.uniforms(*shape, stream=9),
            priority_TK=self.priority(),
            bias_E=bias_E if self.tied else self.normals(self.experts, stream=11),
            position_T=torch.arange(self.tokens) % self.group_size,
        )

    def priority(self) -> Tensor | None:
        if self.policy != "random" or not self.drawn:
            return None
        return self.uniforms(self.tokens, self.columns, stream=10)

    def mask(self) -> Tensor:
        return torch.tensor(self.valid)

    # ---- answers

    def answer(self, leaves: dict[str, Tensor]) -> oracle.Answer:
        """What the oracle says of the same tokens."""
        given = self.given()
        heard = listen(self.router, leaves, self.valid, given)
        return oracle.route(self.router, heard, self.rules(given))

    def route(self, leaves: dict[str, Tensor]) -> Routing:
        """The routing of the code under test."""
        where = self.group_size, self.slots
        return route(self.router, leaves, self.mask(), self.given(), *where)

    def settle(self, record: Routing) -> Settled:
        """The plan of the code under test."""
        settled, slots = record, self.slots
        if slots is None:
            return Settled(record, record, plan_dropless(record))
        if self.policy == "spill":
            settled = spill(record, self.group_size, slots, self.depth)
        priority_TK = (
            routing.comparable(record.gate_TK) if self.policy == "probability" else self.priority()
        )
        plan = plan_capacity(settled, self.group_size, slots, priority_TK)
        return Settled(record, settled, plan)


def coarse(values: Tensor) -> Tensor:
    """Multiples of 2^-10, whose products add up exactly in any order."""
    return (values * 1024).round() / 1024


class Settled(NamedTuple):
    """A routing as chosen and as carried out, and the plan of that."""

    record: Routing
    settled: Routing
    plan: Plan

    @property
    def ledger(self) -> Ledger:
        return ledger(*self)


def topk_record(logits_TE: Tensor, k: int, valid: Sequence[bool] | None = None) -> Routing:
    valid_T = torch.tensor(valid or [True] * len(logits_TE))
    return routing.topk(logits_TE, valid_T, k, renormalize=True)


def asking(choices: Sequence[tuple[int, ...]], experts: int) -> Tensor:
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


def gradients(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a scalar, zero where it does not depend on a leaf."""
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True))


# ---- strategies ----------------------------------------------------------------------------------


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def routers(draw: st.DrawFn, experts: int, kind: str) -> Router:
    """Any legal settings of a gate."""
    if kind in ("switch", "gshard", "dense"):
        return Router(kind, {"switch": 1, "gshard": 2, "dense": experts}[kind])
    if kind not in ("sigmoid", "hierarchical"):
        return Router(kind, draw(st.integers(1, experts)), draw(st.booleans()))
    groups = draw(st.sampled_from(divisors(experts)))
    top_groups = draw(st.integers(1, groups))
    if kind == "sigmoid" and groups == 1:
        return Router(kind, draw(st.integers(1, experts)), scale=draw(st.sampled_from([1.0, 2.5])))
    k = top_groups * draw(st.integers(1, experts // groups))
    renormalize = kind == "sigmoid" or draw(st.booleans())
    return Router(kind, k, renormalize, groups=groups, top_groups=top_groups)


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
def cases(
    draw: st.DrawFn,
    kind: str | None = None,
    dropless: bool | None = None,
    policy: str | None = None,
) -> Case:
    """Any small layer; the arguments pin the gate, whether there is a capacity, and who loses."""
    kind = kind or draw(st.sampled_from(GATES))
    dropless = draw(st.booleans()) if dropless is None else dropless
    experts = draw(st.integers(2 if kind == "gshard" else 1, 8))
    groups, group_size = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    return Case(
        router=draw(routers(experts, kind)),
        experts=experts,
        groups=groups,
        group_size=group_size,
        valid=draw(padding(groups, group_size)),
        drawn=draw(st.booleans()),
        factor=None if dropless and kind != "expert_choice" else draw(st.sampled_from(FACTORS)),
        min_capacity=draw(st.integers(1, 4)),
        policy=policy or draw(st.sampled_from(POLICIES)),
        depth=draw(st.integers(1, 3)),
        tied=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )
