"""Checkpoints move between engines, stages and layouts, bit by bit: weights, moments, steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity
import pytest
from deepspeed_layouts import DATA2_EP2, EP4, ROUNDING, Variant, under
from layouts import BATCH, LENGTH, Text, pick
from parity import Tensors, alone, build_run, weights_of
from runs import assert_same_bits

from moetrain import checkpoint
from moetrain.config import Config
from moetrain.step import Position, train_step
from moetrain.testing import RankPool

CASE = pick("sigmoid", dropless=True)
TORCH = under(CASE.config, DATA2_EP2, "torch")


def go_on(config: Config, text: Text, folder: Path, start: Path | None, steps: range) -> Tensors:
    """One rank: load where to start, take these steps, save into `folder`; the weights then."""
    run = build_run(config, text)
    engine: Any = run.engine
    if start is not None:
        checkpoint.load(start, engine.engine.state())
    for step in steps:
        train_step(run, Position(step, step * BATCH, step * BATCH * LENGTH))
    checkpoint.save(folder, steps.stop, engine.engine.state(), {})
    return weights_of(engine.engine)


class Journey:
    """Runs in a folder of their own, one after the other."""

    def __init__(self, pool: RankPool, folder: Path):
        self.pool, self.folder = pool, folder
        self.weights: Tensors = {}

    def run(self, config: Config, name: str, start: Path | None, steps: range) -> Path:
        """Where the checkpoint is."""
        folder = self.folder / name
        ranks = self.pool.run(go_on, config, CASE.text, folder, start, steps)
        self.weights = ranks[0]
        (path,) = checkpoint.committed(folder)
        return path


@pytest.fixture
def journey(ranks4: RankPool, tmp_path: Path) -> Journey:
    return Journey(ranks4, tmp_path)


@pytest.mark.parametrize("stage", [0, 2])
def test_from_torch_at_ep_2_to_deepspeed_at_ep_4_and_back(journey: Journey, stage: int) -> None:
    """And the training that goes on at each stop is that of one process."""
    deepspeed = Variant(EP4, stage, CASE).config()
    one = journey.run(TORCH, "one", None, range(1))
    moved = journey.run(deepspeed, "moved", one, range(1, 1))
    assert_same_bits(one, moved)
    two = journey.run(deepspeed, "two", moved, range(1, 2))
    back = journey.run(TORCH, "back", two, range(2, 2))
    assert_same_bits(two, back)
    journey.run(TORCH, "three", back, range(2, 3))
    for name, value in alone(CASE.config, CASE.text, steps=3).weights.items():
        parity.close(journey.weights[name], value, f"{name} ends up", ROUNDING)


OFFLOAD = '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}'


@pytest.mark.parametrize(("stage", "given"), [(1, OFFLOAD), (2, None)])
def test_resumed_training_is_that_of_a_run_without_a_stop(
    journey: Journey, tmp_path: Path, stage: int, given: str | None
) -> None:
    """At the same layout, bit by bit; the stop is at another stage and layout."""
    path = None if given is None else tmp_path / "ds.json"
    if path is not None and given is not None:
        path.write_text(given)
    config = Variant(EP4, stage, CASE).config(deepspeed_config=path)
    elsewhere = Variant(DATA2_EP2, (stage + 1) % 3, CASE).config()
    whole = journey.run(config, "whole", None, range(3))
    half = journey.run(config, "half", None, range(2))
    moved = journey.run(elsewhere, "moved", half, range(2, 2))
    assert_same_bits(half, moved)
    assert_same_bits(journey.run(config, "rest", moved, range(2, 3)), whole)


def test_nothing_is_saved_twice(journey: Journey) -> None:
    """Every element once, in boxes: those of a moment that ZeRO cut anywhere, too."""
    config = Variant(DATA2_EP2, 1, CASE).config()
    saved = checkpoint.read_manifest(journey.run(config, "one", None, range(1))).tensors
    cut = 0
    for name, entry in saved.items():
        numel = sum(_product(piece.sizes) for piece in entry.pieces)
        assert numel == _product(entry.shape), name
        cut += len(entry.pieces) > 1
    assert cut > 5


def _product(sizes: list[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
