"""What is not finite on one rank, or a spike: all ranks skip it, and go on as if it had not been.

Loss, gradients or what a layer is given turn NaN, infinite or huge for real, on one rank of two.
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

from moetrain.config import Config
from moetrain.moe import MoE
from moetrain.moe.router import Inputs
from moetrain.objective import reduce
from moetrain.optim import StepOutcome
from moetrain.spikes import EMPTY, Limits, Window
from moetrain.step import Position, Run, StepResult, train_step
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

    def spoiled(lr: float, limits: Limits) -> StepOutcome:
        grad = next(w.grad for name, w in engine.engine.weights.items() if "w_down" in name)
        grad.to_local().view(-1)[0] = bad
        return step(lr, limits)

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
    is_spike: list[bool]
    outcomes: list[StepOutcome]
    before: dict[str, Tensor]
    """All that the engine keeps, before the bad step."""
    after: dict[str, Tensor]
    last: dict[str, Tensor]
    """After the third step."""
    spared: dict[str, Tensor]
    """The same of a run that never took the second; of a step in one part, empty."""
    ledgers: list[list[int]]
    """Of the bad step: outcomes of every layer, over all ranks."""


def kept(run: Run) -> dict[str, Tensor]:
    """This rank's share of weights, moments, step counts and biases, in memory of its own."""
    return {
        name: (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in run.engine.state().items()
    }


def skipping(config: Config) -> Config:
    return config.model_copy(
        update={"train": config.train.model_copy(update={"spike_response": "skip"})}
    )


def take(run: Run, number: int, window: Window = EMPTY) -> StepResult:
    return train_step(run, Position(number - 1, (number - 1) * BATCH, 0, window=window))


def about(outcome: StepOutcome) -> Window:
    """As if many steps had been like this one, by half: a spike is what is four times it."""
    shares = (0.5, 1.5) * 16
    losses, norms = ([share * of for share in shares] for of in outcome[:2])
    return Window(losses, norms)


def observe(case: Case, layout: Layout, spoil: Spoil, bad: float) -> Seen:
    """One rank's part."""
    config = skipping(spread(case.config, layout))
    run = build_run(config, case.text)
    results = [take(run, 1)]
    window = about(results[0].outcome)
    before = kept(run)
    if run.mesh.rank == VICTIM:
        with spoil(run, bad):
            results.append(take(run, 2, window))
    else:
        results.append(take(run, 2, window))
    after = kept(run)
    means = reduce(results[1].parts, results[1].counts, run.mesh)
    results.append(take(run, 3, window))
    spared = {}
    if layout == IN_PARTS:
        other = build_run(config, case.text)
        take(other, 1)
        take(other, 3)
        spared = kept(other)
    return Seen(
        [result.is_bad for result in results],
        [result.is_spike for result in results],
        [result.outcome for result in results],
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
        assert [outcome.was_skipped for outcome in seen.outcomes] == [False, True, False]
        assert seen.is_bad == [False, not math.isfinite(bad), False]
        assert seen.is_spike == [False, math.isfinite(bad), False]
        assert math.isfinite(seen.outcomes[1].grad_norm) == math.isfinite(bad)
        assert seen.outcomes[::2] == ranks[0].outcomes[::2], "ranks disagree"
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


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6], ids=str)
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
        assert len(seen.ledgers) == 2 // case.every
        for outcome in seen.ledgers:
            if case.gate != "expert_choice":
                assert sum(outcome) == tokens * case.config.moe.top_k
