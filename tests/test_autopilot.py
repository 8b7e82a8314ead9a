"""The capacity autopilot: what other factors would have dropped, who moves when, and whole runs."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import ROUTERS, build, draws_for, random_x, run
from runs import assert_same_bits, train_on, write_config
from strategies import GATES, MANY, POLICIES, Case, cases, topk_record

from moetrain import autopilot, checkpoint
from moetrain.autopilot import FACTORS, MARGIN, OFF, STEPS, Autopilot, changes, decide
from moetrain.moe import OUTCOMES, Ledger, Routing
from moetrain.moe.capacity import would_drop
from moetrain.replay import compare, replay
from moetrain.sinks import read_metrics
from moetrain.step import Position
from moetrain.trace import Trace

CHOOSING = [gate for gate in GATES if gate != "expert_choice"]
"""Gates with which tokens choose."""
IN_LINE = [policy for policy in POLICIES if policy != "spill"]
"""Drop policies under which losers go nowhere."""


def dropped(ledger: Ledger) -> int:
    return int(ledger.outcome_EKO[..., OUTCOMES.index("dropped")].sum())


# ---- what another factor would have dropped ------------------------------------------------------


def turned_away(case: Case, record: Routing, slots: int) -> int:
    """Token by token: who finds its expert full."""
    lost, taken = 0, Counter[tuple[int, int]]()
    for token, valid in enumerate(case.valid):
        for choice in range(record.expert_TK.shape[1] if valid else 0):
            if record.sampled_TK[token, choice]:
                place = token // case.group_size, int(record.expert_TK[token, choice])
                lost += taken[place] >= slots
                taken[place] += 1
    return lost


@MANY
@given(
    st.tuples(st.sampled_from(CHOOSING), st.sampled_from(IN_LINE)).flatmap(
        lambda way: cases(kind=way[0], dropless=False, policy=way[1])
    )
)
def test_it_is_what_running_with_the_factor_drops(case: Case) -> None:
    """For every gate, every policy but spill, any padding and GShard's second choices that were not
    sampled: beside a loop over tokens, and beside the ledger of a plan at that factor."""
    record = case.route(case.leaves())
    shape = case.group_size, case.experts, case.router.k, case.min_capacity
    size, experts, k, least = shape
    slots = [oracle.capacity(size, experts, k, factor, least) for factor in FACTORS]
    found = would_drop(record, size, slots).tolist()
    assert found == [turned_away(case, record, of_each) for of_each in slots]
    at_factor = (dataclasses.replace(case, factor=factor) for factor in FACTORS)
    assert found == [dropped(one.settle(record).ledger) for one in at_factor]


def test_numbers_by_hand() -> None:
    """Expert 0 is asked by all four tokens, expert 1 by three, expert 2 by one; in groups of two
    the first of them asks expert 0 twice and expert 1 twice, the second 2, 1 and 1."""
    logits = [[3, 2, 0], [3, 2, 0], [3, 2, 0], [3, 0, 2]]
    logits_TE = torch.tensor(logits, dtype=torch.float64)
    record = topk_record(logits_TE, k=2)
    assert would_drop(record, 4, [1, 2, 3, 4]).tolist() == [3 + 2, 2 + 1, 1, 0]
    assert would_drop(record, 2, [1, 2]).tolist() == [2 + 1, 0]
    padded = topk_record(logits_TE, k=2, valid=[True, True, True, False])
    assert would_drop(padded, 4, [1, 2, 3, 4]).tolist() == [2 + 2, 1 + 1, 0, 0]


@pytest.mark.parametrize("kind", ["gshard", "sigmoid", "hash"])
@pytest.mark.parametrize("policy", IN_LINE)
def test_a_layer_counts_what_a_layer_of_another_factor_drops(kind: str, policy: str) -> None:
    if (kind, policy) == ("hash", "probability"):
        policy = "position"  # its weights are all equal
    x_BLD, draws = random_x(3, 8), draws_for(24)
    options: dict[str, Any] = {"drop_policy": policy, "min_capacity": 2, "group": 4}
    watching = build(ROUTERS[kind], 4, capacity_factor=1.0, watched_factors=FACTORS, **options)
    found = run(watching, x_BLD, mode="train", draws=draws).stats.would_drop_F.tolist()
    others = (build(ROUTERS[kind], 4, capacity_factor=factor, **options) for factor in FACTORS)
    stats = [run(other, x_BLD, mode="train", draws=draws).stats for other in others]
    assert found == [dropped(of.ledger) for of in stats]
    assert found[0] > found[-1]
    assert all(of.would_drop_F.numel() == 0 for of in stats), "nobody watches"


# ---- who moves when ------------------------------------------------------------------------------

# Of 1000, at:  0.5  0.75    1  1.25  1.5  1.75  2  3  4
EVEN = [500, 250, 0, 0, 0, 0, 0, 0, 0]
YOUNG = [700, 600, 500, 400, 300, 200, 100, 20, 5]
USUAL = [550, 300, 80, 30, 12, 6, 4, 0, 0]


@pytest.mark.parametrize(
    ("factor", "of_1000", "target", "after"),
    [
        (1.75, USUAL, 0.01, 1.75),  # 0.6 % is within, and 1.5 would not be
        (2.0, USUAL, 0.01, 1.75),  # 0.6 % is less than three quarters of the target
        (2.0, USUAL, 0.007, 2.0),  # it would be within, but for the margin
        (4.0, USUAL, 0.10, 3.0),  # down by one, though five smaller ones would do
        (1.0, USUAL, 0.01, 1.75),  # up at once, past 1.25 and 1.5
        (1.0, USUAL, 0.08, 1.0),  # 8 % of at most 8 %
        (1.75, USUAL, 0.016, 1.5),  # 1.2 % is just three quarters of 1.6 %
        (1.75, USUAL, 0.0159, 1.75),
        (1.0, YOUNG, 0.004, 4.0),  # not even the largest: it is the best there is
        (4.0, YOUNG, 0.004, 4.0),
        (1.25, EVEN, 0.01, 1.0),
        (1.0, EVEN, 0.01, 1.0),  # below 1 even experts drop
        (0.75, EVEN, 0.6, 0.75),
        (0.75, EVEN, 0.7, 0.5),
        (0.5, EVEN, 0.7, 0.5),  # there is nothing smaller
        (0.5, EVEN, 0.4, 0.75),
        (4.0, [0] * 9, 0.01, 3.0),  # no assignments, no drops
    ],
)
def test_decisions(factor: float, of_1000: list[int], target: float, after: float) -> None:
    assert MARGIN == 0.75
    assert decide(factor, 1000, of_1000, target) == after
    assert decide(factor, 10**15, [10**12 * lost for lost in of_1000], target) == after


def steps(state: Autopilot, number: int, *tally: list[int], target: float = 0.01) -> Autopilot:
    for _ in range(number):
        state = state.after(list(tally), target)
    return state


def test_a_decision_looks_back_on_all_steps_since_the_last() -> None:
    """Two layers begin with the largest factor. One bad step of sixteen does not stop a
    descent that their sum allows, and the sums begin anew."""
    one, other = [1000, *USUAL], [1000, *YOUNG]
    state = steps(OFF, STEPS - 1, one, other)
    assert (state.factors, state.steps) == ([4.0, 4.0], STEPS - 1)
    assert state.sums == [[15 * n for n in one], [15 * n for n in other]]
    state = state.after([[1000, *YOUNG], other], 0.01)
    assert state == Autopilot([3.0, 4.0]), "20 of 16000 at 3.0, and 320"
    state = steps(state, 2 * STEPS, one, other)
    assert state == Autopilot([1.75, 4.0])
    assert steps(state, STEPS, [1000, *YOUNG], other).factors == [4.0, 4.0]


def test_a_skipped_step_has_no_tally_and_changes_nothing() -> None:
    state = steps(OFF, 5, [1000, *USUAL])
    assert state.after([], 0.01) == state
    assert OFF.after([], 0.01) == OFF


def test_changes_in_words() -> None:
    before, after = Autopilot([1.25, 2.0, 1.25, 1.5]), Autopilot([1.5, 1.5, 1.5, 1.5])
    assert changes(before, after) == ("1.25 -> 1.5 in MoE layers 0, 2; 2.0 -> 1.5 in MoE layer 1")
    assert changes(OFF, Autopilot([4.0, 4.0])) == ""
    assert changes(OFF, Autopilot([4.0, 3.0])) == "4.0 -> 3.0 in MoE layer 1"
    assert changes(OFF, OFF) == ""


def test_a_position_survives_json() -> None:
    state = steps(OFF, STEPS + 3, [1000, *USUAL], [10**17, *YOUNG])
    position = Position(19, 152, 4864, autopilot=state)
    assert Position.of(json.loads(json.dumps(dataclasses.asdict(position)))) == position


# ---- whole runs ----------------------------------------------------------------------------------

TARGET, SKIPPED, SAVED, LAST = 0.3, 3, 7, 14
SHORT = 4
"""Steps that a decision looks back on here."""


def train_briefly(*arguments: Any, **options: Any) -> tuple[Path, list[str]]:
    """See `train_on`."""
    with mock.patch.object(autopilot, "STEPS", SHORT):
        return train_on(*arguments, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path]:
    """Configuration and folder of a run with two MoE layers, whose step 3 was not finite."""
    config = write_config(
        tmp_path_factory.mktemp("autopilot"),
        name="whole",
        engine={"precision": "fp64"},
        moe={
            **{"capacity_factor": "auto", "target_drop_rate": TARGET, "first_dense": 0},
            **{"router": "gshard", "drop_policy": "random", "experts": 8},
        },
        parallel={"ep": 2},
        train={"steps": LAST},
        eval={"every": 0},
        checkpoint={"every": SAVED},
        log={"trace": True},
    )
    folder, errors = train_briefly(2, config, bad=frozenset({SKIPPED}))
    assert errors == ["", ""]
    return config, folder


def counted(folder: Path) -> list[list[list[Any]]]:
    """Of every step and layer the factor and the counts."""
    names = ("capacity_factor", "assigned", "kept", "dropped", "not_sampled", "slots", "load")
    lines = read_metrics(folder)
    return [[[layer[name] for name in names] for layer in line["layers"]] for line in lines]


def position_of(folder: Path, step: int) -> dict[str, Any]:
    saved = folder / "checkpoints" / f"step-{step:08d}"
    return checkpoint.read_manifest(saved).extra["position"]


def test_layers_move_when_a_window_of_applied_steps_is_full(whole) -> None:
    """Four steps, and the one that was skipped; then four more, and again."""
    lines = read_metrics(whole[1])
    factors = [[layer["capacity_factor"] for layer in line["layers"]] for line in lines]
    moved = [line["step"] for line, now, was in zip(lines[1:], factors[1:], factors, strict=False)
             if now != was]  # fmt: skip
    assert factors[0] == [4.0, 4.0]
    assert moved == [6, 10, 14]
    assert factors[5] == [3.0, 3.0]
    assert all(layer["dropped"] <= TARGET * layer["assigned"] for layer in lines[-1]["layers"])


def test_a_replay_has_the_factors_and_every_count_of_the_run(whole) -> None:
    recorded = replay(Trace.open(whole[1]))
    assert compare(recorded, read_metrics(whole[1])) == (LAST, [])
    assert len({str(line["layers"][0]["capacity_factor"]) for line in read_metrics(whole[1])}) > 2


def test_the_sums_that_are_saved_are_those_of_the_ledger(whole) -> None:
    """What the present factor would have dropped is what was dropped, and what the next did is what
    it would have: of the steps since the last decision, which is that after step 5."""
    lines = read_metrics(whole[1])[5:SAVED]
    state = Autopilot(**position_of(whole[1], SAVED)["autopilot"])
    assert state.steps == len(lines) == 2
    for number, (factor, sums) in enumerate(zip(state.factors, state.sums, strict=True)):
        layers = [line["layers"][number] for line in lines]
        assert sums[0] == sum(layer["assigned"] for layer in layers)
        assert sums[1 + FACTORS.index(factor)] == sum(layer["dropped"] for layer in layers)
        assert sums[1:] == sorted(sums[1:], reverse=True)


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, []),
        (4, ["--parallel.ep", 4, "--train.micro-batch", 1]),
        (1, ["--parallel.ep", 1, "--train.micro-batch", 8]),
    ],
    ids=["same layout", "ep4", "one rank"],
)
def test_a_resumed_run_picks_the_same_factors(whole, world: int, flags: list[object]) -> None:
    """From the middle of a window, at this layout bit by bit, at others with the same counts."""
    config, folder = whole
    start = folder / "checkpoints" / f"step-{SAVED:08d}"
    name = f"resumed-on-{world}"
    resumed, errors = train_briefly(
        world, config, "--name", name, "--checkpoint.resume", start, *flags
    )
    assert set(errors) == {""}
    assert counted(resumed) == counted(folder)[SAVED:]
    ours, theirs = (position_of(run, LAST)["autopilot"] for run in (resumed, folder))
    assert ours == theirs
    if world == 2:
        assert_same_bits(*(run / "checkpoints" / f"step-{LAST:08d}" for run in (resumed, folder)))
