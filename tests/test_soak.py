"""A short soak (`python benchmarks/soak.py` is the long one), and faults that its checks find."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import sys
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import soak  # noqa: E402
from soaking import checks  # noqa: E402
from soaking.checks import SoakError  # noqa: E402
from soaking.plans import HOME, KINDS, Kill, Layout, Plan, draws  # noqa: E402
from soaking.rounds import Round, Tally, Whole, uninterrupted  # noqa: E402

STEPS, ROUTER = 14, "sigmoid"
EXACT = next(kind for kind in KINDS if kind.precision == "fp64")
PLANS = (
    Plan(HOME, kill=Kill("step", 11, 0.0, SIGKILL, "one rank")),
    Plan(Layout(2, 1), kill=Kill("save", 1, 0.01, SIGKILL, "all ranks")),
    Plan(Layout(1, 1), kill=Kill("evaluation", 1, 0.0, SIGTERM, "all ranks")),
    Plan(HOME),
)
"""The first is sure to hit, and to leave something to resume; the others may come too late."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, _server: None) -> Whole:
    """The run that nobody killed."""
    return uninterrupted(tmp_path_factory.mktemp("whole") / "run", EXACT, ROUTER, STEPS)


def test_a_run_that_is_killed_and_resumed_elsewhere_is_the_one_that_was_not(
    tmp_path: Path, whole: Whole
) -> None:
    tally = Tally()
    Round(tmp_path / "run", EXACT, ROUTER, STEPS, tally).soak(PLANS, whole)
    assert sum(tally.kills.values()) >= 1
    assert tally.moves >= 1
    assert tally.checked["steps with the samples of the uninterrupted run"] == STEPS
    assert tally.checked["ledgers that add up"] == 2 * STEPS
    for held in ("once loaded", "to 1e-09 at the end"):
        assert [count for what, count in tally.checked.items() if what.endswith(held)], held
    assert json.loads(json.dumps(soak.numbers(tally)))["rounds"] == {EXACT.name: 1}
    assert f"| {EXACT.name} | 1 |" in soak.report(tally, minutes=1)


def test_a_round_ends_with_a_start_that_nobody_kills() -> None:
    """After so many kills, and when the time is over."""
    for deadline, kills in ((math.inf, soak.KILLS), (0.0, 0)):
        plans = list(soak.until(deadline, draws(random.Random(0), [HOME])))
        assert [plan.kill is not None for plan in plans] == [True] * kills + [False]


# ---- what the checks find ------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, whole: Whole) -> Path:
    """A copy of that run, to be spoiled."""
    return Path(shutil.copytree(whole.run, tmp_path / "copy"))


def test_a_flipped_bit_of_a_committed_checkpoint(run: Path) -> None:
    assert checks.check_committed(run) == 3
    file = next(checks.checkpoint_of(run, STEPS).glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(SoakError, match=f"does not verify.*{file.name}"):
        checks.check_committed(run)


def test_a_directory_without_a_marker_is_no_checkpoint(run: Path) -> None:
    (checks.checkpoint_of(run, STEPS) / "COMMITTED").unlink()
    with pytest.raises(SoakError, match=r"does not verify.*COMMITTED"):
        checks.check_committed(run)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({0: {16: 0}}, "step 2 was trained on samples [], not on [8, 9,"),
        ({2: {}}, "step 2 was trained on samples [], not on [8, 9,"),
        ({2: dict.fromkeys(range(7, 15), 0)}, "step 2 was trained on samples [7, 8,"),
        ({2: dict.fromkeys(range(8, 16), 0)}, "step 2 has other tokens"),
        ({3: dict.fromkeys(range(16, 24), 1)}, "the run of 2 steps went on to 3"),
    ],
)
def test_samples_lost_repeated_changed(samples: checks.History, message: str) -> None:
    right = {step: dict.fromkeys(range(8 * step - 8, 8 * step), 1) for step in (1, 2)}
    assert checks.check_samples(right, right, steps=2, batch=8) == 2
    wrong = {1: right[1], **samples} if 0 in samples else {**right, **samples}
    with pytest.raises(SoakError, match=re.escape(message)):
        checks.check_samples(wrong, right, steps=2, batch=8)


def test_what_came_after_the_checkpoint_never_happened() -> None:
    before = {1: {0: 1}, 2: {1: 1}, 3: {2: 9}}
    assert checks.continued(before, 2, {3: {2: 1}}) == {1: {0: 1}, 2: {1: 1}, 3: {2: 1}}
    assert checks.continued(before, 0, {}) == {}


def journal(*events: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"event": "begin", "step": 5}, *events]


def test_a_sample_that_two_ranks_read() -> None:
    one = journal({"event": "read", "samples": [[32, 1], [33, 1]]})
    other = journal({"event": "read", "samples": [[33, 1]]})
    assert checks.samples_by_step([one]) == {5: {32: 1, 33: 1}}
    with pytest.raises(SoakError, match="step 5 read sample 33 twice"):
        checks.samples_by_step([one, other])


def test_a_line_that_differs(run: Path, whole: Whole) -> None:
    """In its last bit; by more than the tolerance; in the band's width; in what it accounts for."""
    path = run / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]

    def spoil(**values: Any) -> None:
        texts = [json.dumps({**line, **values} if line is lines[3] else line) for line in lines]
        path.write_text("\n".join(texts) + "\n")

    loss = lines[3]["loss"]
    spoil(step_time_s=1.0)
    assert checks.check_lines(run, whole.run, 0) == len(lines)
    spoil(loss=loss * (1 + 2**-52))
    assert checks.check_lines(run, whole.run, 1e-9) == len(lines)
    with pytest.raises(SoakError, match=r"^step 4: loss: \S+ instead of"):
        checks.check_lines(run, whole.run, 0)
    spoil(loss=loss * (1 + 1e-8))
    with pytest.raises(SoakError, match=r"^step 4: loss: \S+ instead of"):
        checks.check_lines(run, whole.run, 1e-9)
    spoil(loss=loss + 0.03)
    assert checks.check_losses(run, whole.run, 0.04) == len(lines)
    with pytest.raises(SoakError, match=r"a loss is off by 0.0300 nats, above 0.02"):
        checks.check_losses(run, whole.run, 0.02)
    first, second = lines[3]["layers"]
    spoil(layers=[first, {**second, "dropped": second["dropped"] + 1}])
    with pytest.raises(SoakError, match=r"^step 4: a ledger does not add up"):
        checks.check_ledgers(run, whole.run)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(SoakError, match=r"metrics.jsonl has lines of other steps"):
        checks.check_lines(run, whole.run, 0)


def test_tensors_that_differ(whole: Whole) -> None:
    """At the end, and once loaded."""
    path = checks.checkpoint_of(whole.run, STEPS)
    saved, other = checks.read_tensors(path), checks.read_tensors(path)
    assert checks.check_same_tensors(other, saved, 0) == len(saved)
    name = next(name for name in saved if name.endswith("experts.w_down"))
    pieces = {
        key: [([0] * value.ndim, list(value.shape), checks.crc(value))]
        for key, value in saved.items()
    }
    events = [{"event": "loaded", "step": STEPS, "pieces": pieces}]
    assert checks.check_loaded([events], 1, STEPS, saved) == len(saved)
    assert checks.check_loaded([events], 2, STEPS, saved) == 0
    with pytest.raises(SoakError, match="resumed from step 14, but step 10 was committed last"):
        checks.check_loaded([events], 1, 10, saved)

    other[name].view(-1)[0] += 1e-6
    with pytest.raises(SoakError, match=f"{name} differs at the end"):
        checks.check_same_tensors(other, saved, 0)
    with pytest.raises(SoakError, match=f"{name} is off by 1e-06 at the end"):
        checks.check_same_tensors(other, saved, 1e-9)
    with pytest.raises(
        SoakError, match=f"{name} at .* is not what the checkpoint of step 14 holds"
    ):
        checks.check_loaded([events], 1, STEPS, other)
    pieces[name] = []
    with pytest.raises(SoakError, match=f"of {name}, 0 of {saved[name].numel()} elements are held"):
        checks.check_loaded([events], 1, STEPS, saved)
