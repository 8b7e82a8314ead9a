"""The window that spikes are told from, beside numpy, and what runs make of a spike."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_same_bits, lines_without_timings, saved_tensors, train_on, write_config

from moetrain import checkpoint
from moetrain.sinks import read_metrics
from moetrain.spikes import EMPTY, FEWEST, FINITE, NEW_LEVEL, STEPS, Limits, Window, describe
from moetrain.step import Position

LEVEL = 3.0


def filled(count: int, level: float = LEVEL) -> Window:
    """Losses and norms that alternate between two values about `level`."""
    window = EMPTY
    for number in range(count):
        value = level + 0.5 - number % 2
        window = window.after(value, 10 * value, is_spike=False)
    return window


def limit(values: list[float], sigmas: float) -> float:
    """Of the last 128 that were no spikes, once there are 32."""
    last = values[-128:]
    if len(last) < 32:
        return math.inf
    return float(np.mean(last) + sigmas * np.std(last, ddof=1))


NUMBERS = st.floats(-1e3, 1e3, allow_nan=False) | st.floats(1e4, 1e30)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(NUMBERS, NUMBERS.map(abs)), min_size=60, max_size=200),
    st.floats(0.5, 10),
    st.randoms(use_true_random=False),
)
def test_a_window_is_what_numpy_says(pairs, sigmas, chance) -> None:
    """Steps in any order, spikes among them, of which some are skipped."""
    window, losses, norms, row = EMPTY, [], [], 0
    for loss, norm in pairs:
        limits = window.limits(sigmas)
        expected = limit(losses, sigmas), limit(norms, sigmas)
        assert tuple(limits) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert (window.losses, window.grad_norms) == (losses[-128:], norms[-128:])
        is_spike = not limits.admit(loss, norm)
        assert is_spike == (loss > limits.loss or norm > limits.grad_norm)
        if is_spike and chance.random() < 0.5:
            continue  # skipped
        window = window.after(loss, norm, is_spike)
        if not is_spike:
            losses.append(loss)
            norms.append(norm)
        row = row + 1 if is_spike else 0
        if row == 8:
            losses, norms, row = [], [], 0


def test_numbers_by_hand() -> None:
    """32 losses of 2.5 and 3.5: mean 3, standard deviation sqrt(32 · 0.25 / 31)."""
    deviation = math.sqrt(32 * 0.25 / 31)
    loss, norm = filled(FEWEST).limits(6)
    assert (loss, norm) == pytest.approx((3 + 6 * deviation, 30 + 60 * deviation))
    assert filled(FEWEST).limits(0) == FINITE, "0 switches it off"
    assert filled(FEWEST - 1).limits(6) == FINITE, "too few"
    assert len(filled(STEPS + 5).losses) == STEPS


@pytest.mark.parametrize(
    ("loss", "grad_norm", "is_admitted"),
    [
        (4.0, 9.0, True),
        (4.1, 9.0, False),
        (4.0, 9.1, False),
        (-100.0, 0.0, True),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (1.0, math.inf, False),
        (-math.inf, 1.0, False),
    ],
)
def test_what_is_admitted(loss, grad_norm, is_admitted) -> None:
    assert Limits(4.0, 9.0).admit(loss, grad_norm) == is_admitted
    if not math.isfinite(loss + grad_norm):
        assert not FINITE.admit(loss, grad_norm)


def test_a_spike_does_not_hide_the_next() -> None:
    window = filled(FEWEST)
    assert window.after(1e6, 1e7, is_spike=True).limits(6) == window.limits(6)


def test_a_row_of_spikes_is_a_new_level_and_one_usual_step_ends_the_row() -> None:
    window = filled(FEWEST)
    for _ in range(NEW_LEVEL - 1):
        window = window.after(9.0, 9.0, is_spike=True)
    assert window.losses == filled(FEWEST).losses
    assert window.after(9.0, 9.0, is_spike=True) == EMPTY
    window = window.after(LEVEL, LEVEL, is_spike=False)
    assert window.spikes_in_a_row == 0
    assert window.after(9.0, 9.0, is_spike=True).losses == window.losses


def test_huge_numbers_do_not_overflow() -> None:
    assert filled(STEPS, level=1e150).limits(6).loss == pytest.approx(1e150)
    wild = Window([1e-300, 1e150] * 16, [1e-300, 1e150] * 16)
    assert math.isfinite(wild.limits(6).grad_norm)


def test_a_position_survives_json_bit_by_bit() -> None:
    window = dataclasses.replace(filled(60, level=1 / 3), spikes_in_a_row=2)
    position = Position(70, 560, 17920, bad_steps=3, bad_in_a_row=1, spikes=4, window=window)
    assert Position.of(json.loads(json.dumps(dataclasses.asdict(position)))) == position


def test_a_position_of_an_older_checkpoint_has_an_empty_window() -> None:
    saved = {"step": 8, "samples": 64, "tokens": 2048, "bad_steps": 1, "bad_in_a_row": 0}
    assert Position.of(saved) == Position(**saved)
    assert Position.of(saved).window == EMPTY


@pytest.mark.parametrize(
    ("loss", "grad_norm", "words"),
    [
        (9.0, 1.0, "loss 9 (limit 4.5)"),
        (3.0, 12345.6, "gradient norm 1.235e+04 (limit 2)"),
        (9.0, 3.0, "loss 9 (limit 4.5) and gradient norm 3 (limit 2)"),
    ],
)
def test_a_spike_in_words(loss, grad_norm, words) -> None:
    assert describe(loss, grad_norm, Limits(4.5, 2.0)) == words


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spiked_run(tmp_path_factory) -> tuple[Path, Path]:
    """The configuration and the folder of a run whose step 36 was a spike, and skipped. Checkpoints
    of step 34 and 40 have been kept."""
    config = write_config(
        tmp_path_factory.mktemp("spikes"),
        name="spiked",
        moe={"router": "sigmoid", "bias_update_rate": 0.01},
        parallel={"ep": 2},
        train={"steps": 40, "spike_response": "skip"},
        eval={"every": 0},
        checkpoint={"every": 17},
    )
    run, errors = train_on(2, config, bad=frozenset({36}), factor=1e4)
    assert errors == ["", ""]
    return config, run


def from_34(
    spiked_run: tuple[Path, Path], name: str, *flags: object, bad: frozenset[int]
) -> tuple[Path, list[str]]:
    config, run = spiked_run
    resume = "--name", name, "--checkpoint.resume", run / "checkpoints" / "step-00000034"
    return train_on(2, config, *resume, *flags, bad=bad, factor=1e4, first=35)


def test_a_skipped_spike_is_counted_and_a_resumed_run_decides_alike(spiked_run):
    _, run = spiked_run
    lines = read_metrics(run)
    assert [line["step"] for line in lines if line["is_spike"]] == [36]
    assert [line["spikes"] for line in lines[33:]] == [0, 0, 1, 1, 1, 1, 1]
    assert lines[-1]["bad_steps"] == 0
    again, errors = from_34(spiked_run, "again", bad=frozenset({36}))
    assert errors == ["", ""]
    last = [folder / "checkpoints" / "step-00000040" for folder in (again, run)]
    assert_same_bits(*last)
    ours, theirs = (checkpoint.read_manifest(path).extra["position"] for path in last)
    assert ours == theirs
    assert len(ours["window"]["losses"]) == 39
    assert lines_without_timings(again) == lines_without_timings(run)[34:]


def test_a_warning_trains_on_the_spike(spiked_run, capsys):
    flags = "--train.spike-response", "warn", "--checkpoint.every", 1
    folder, errors = from_34(spiked_run, "warned", *flags, bad=frozenset({40}))
    assert errors == ["", ""]
    lines = read_metrics(folder)
    assert [line["is_spike"] for line in lines] == [False] * 5 + [True]
    before, after = (saved_tensors(folder / "checkpoints" / f"step-{n:08d}") for n in (39, 40))
    assert not any(
        torch.equal(value, before[name]) for name, value in after.items() if "exp_avg" in name
    )
    out = capsys.readouterr().out
    assert out.count("step 40 is a spike: loss ") == 1
    assert "1 spike  " in out


def test_a_stop_ends_the_run_before_the_spike_changes_it(spiked_run):
    flags = "--train.spike-response", "stop", "--checkpoint.every", 1
    folder, errors = from_34(spiked_run, "stopped", *flags, bad=frozenset({36}))
    assert len(set(errors)) == 1, "all ranks stop alike"
    assert errors[0].startswith("step 36 is a spike: loss ")
    assert "step-00000035 is the newest checkpoint" in errors[0]
    assert [path.name for path in checkpoint.committed(folder)] == ["step-00000035"]
    assert [line["is_spike"] for line in read_metrics(folder)] == [False, True]


def test_a_run_that_skips_every_step_ends(spiked_run):
    folder, errors = from_34(spiked_run, "stuck", bad=frozenset(range(36, 41)))
    assert len(set(errors)) == 1
    assert "was not finite or a spike in 3 steps in a row, up to step 38" in errors[0]
    assert read_metrics(folder)[-1]["spikes"] == 3
