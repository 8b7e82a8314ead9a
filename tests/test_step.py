"""What is not finite on one rank: all ranks skip the step, and go on as if it had not been.

Loss, gradients or what a layer is given turn NaN or infinite for real, on one rank of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from layouts import BATCH, GATES, Case, Layout, pick, spread
from parity import build_run
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.moe import MoE
from moetrain.moe.router import Inputs
from moetrain.objective import reduce
from moetrain.step import Position, Run, train_step
from moetrain.testing import simulate_ranks

WHOLE, IN_PARTS = (Layout(2, ep=2, dp_replicate=1, micro=micro) for micro in (8, 4))
VICTIM = 1
"""The rank on which it happens."""
Spoil = Callable[[Run, float], AbstractContextManager[None]]


# ---- what goes wrong -----------------------------------------------------------------------------


@contextmanager
def a_loss(run: Run, bad: float) -> Iterator[None]:
    """The first of two micro-batches."""
    backward = run.engine.backward

    def spoiled(loss: Tensor, last: bool) -> None:
        backward(loss if last else loss * bad, last)

    run.engine.backward = spoiled  # type: ignore[method-assign]
    yield
    run.engine.backward = backward  # type: ignore[method-assign]


@contextmanager
def a_gradient(run: Run, bad: float) -> Iterator[None]:
    """One number of this rank's shard, after the backward pass."""
    engine: Any = run.engine
    step = engine.engine.step

    def spoiled(lr: float) -> float:
        grad = next(w.grad for name, w in engine.engine.weights.items() if "w_down" in name)
        grad.to_local().view(-1)[0] = bad
        return step(lr)

    engine.engine.step = spoiled
    yield
    engine.engine.step = step


@contextmanager
def logits(run: Run, bad: float) -> Iterator[None]:
    """Those of one token in the first router: what it reads of that token is not finite."""

    def spoil(_: Any, arguments: tuple[Inputs]) -> tuple[Inputs]:
        x_TD = arguments[0].x_TD.clone()
        x_TD[1] = bad
        return (arguments[0]._replace(x_TD=x_TD),)

    layer = next(m for m in run.engine.model.modules() if isinstance(m, MoE))
    hook = layer.router.register_forward_pre_hook(spoil)
    yield
    hook.remove()


@contextmanager
def a_vector(run: Run, bad: float) -> Iterator[None]:
    """One token of what the first MoE layer is given: logits, experts and the rows sent along."""

    def spoil(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BLD = arguments[0].clone()
        x_BLD[0, 1] = bad
        return x_BLD, *arguments[1:]

    layer = next(m for m in run.engine.model.modules() if isinstance(m, MoE))
    hook = layer.register_forward_pre_hook(spoil)
    yield
    hook.remove()


# ---- three steps, of which the second is spoiled, beside a run that never took it ----------------


class Seen(NamedTuple):
    """One rank."""

    is_bad: list[bool]
    """In every step."""
    norms: list[float]
    before: dict[str, Tensor]
    """All that the engine keeps, before the bad step."""
    after: dict[str, Tensor]
    last: dict[str, Tensor]
    """After the third step."""
    spared: dict[str, Tensor]
    """The same of a run that never took the second; of a step in one part, empty."""
    outcomes: list[list[int]]
    """Of the bad step: of every layer, over all ranks."""


def kept(run: Run) -> dict[str, Tensor]:
    """This rank's share of weights, moments, step counts and biases, in memory of its own."""
    return {
        name: (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in run.engine.state().items()
    }


def take(run: Run, number: int) -> Any:
    return train_step(run, Position(number - 1, (number - 1) * BATCH, 0))


def observe(case: Case, layout: Layout, spoil: Spoil, bad: float) -> Seen:
    """One rank's part."""
    config = spread(case.config, layout)
    run = build_run(config, case.text)
    results = [take(run, 1)]
    before = kept(run)
    if run.mesh.rank == VICTIM:
        with spoil(run, bad):
            results.append(take(run, 2))
    else:
        results.append(take(run, 2))
    after = kept(run)
    means = reduce(results[1].parts, results[1].counts, run.mesh)
    results.append(take(run, 3))
    spared = {}
    if layout == IN_PARTS:
        other = build_run(config, case.text)
        take(other, 1)
        take(other, 3)
        spared = kept(other)
    return Seen(
        [result.is_bad for result in results],
        [result.grad_norm for result in results],
        before,
        after,
        kept(run),
        spared,
        [book.outcome_EKO.sum((0, 1)).tolist() for book in means.ledgers],
    )


def skipped(case: Case, layout: Layout, spoil: Spoil, bad: float) -> list[Seen]:
    """Spoil a step and hold all ranks to what must have happened."""
    ranks = simulate_ranks(layout.world, observe, case, layout, spoil, bad)
    for seen in ranks:
        assert seen.is_bad == [False, True, False]
        assert not math.isfinite(seen.norms[1])
        assert same(seen.before, seen.after), "the bad step left a trace"
        if layout == IN_PARTS:
            assert same(seen.last, seen.spared), "the step after it is another one"
        assert not same(seen.after, seen.last)
        for name, value in seen.last.items():
            assert value.isfinite().all(), name
    return ranks


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


SPOILS = [a_loss, a_gradient, logits, a_vector]
STATEFUL = (pick("sigmoid", dropless=False), pick("limited", dropless=False))


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_all_ranks_skip_what_one_rank_spoils(spoil: Spoil, bad: float) -> None:
    """Weights, moments, step counts and biases keep every bit; the next batch is trained on."""
    case = STATEFUL[SPOILS.index(spoil) % 2]
    for seen in skipped(case, IN_PARTS, spoil, bad):
        biases = [name for name in seen.before if name.endswith("router.bias")]
        assert biases
        assert all(seen.before[name].any() for name in biases)


EACH_GATE = [pick(name, dropless=name in list(GATES)[::3]) for name in GATES if name not in
             ("limited", "sigmoid", "expert_choice")]  # fmt: skip


@pytest.mark.parametrize("case", [*EACH_GATE, pick("expert_choice", group=4)], ids=str)
def test_every_gate_and_policy_goes_through_a_bad_vector(case: Case) -> None:
    """No index leaves its range, no assignment is lost, no rank waits for another."""
    spoil = a_vector if case.gate in ("hash", "random", "balanced") else logits
    tokens = int(case.text.batch(range(BATCH, 2 * BATCH)).valid_BL.sum())
    for seen in skipped(case, WHOLE, spoil, math.nan):
        assert len(seen.outcomes) == 2 // case.every
        for outcome in seen.outcomes:
            if case.gate != "expert_choice":
                assert sum(outcome) == tokens * case.config.moe.top_k
