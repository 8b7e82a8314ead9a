"""Weights that keep their values, and the others trained as if those were constants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import Layout, pick, spread
from parity import agree, alone, on_rank
from runs import model_of, saved_tensors, train, write_config

from moetrain import checkpoint, restore
from moetrain.build import build_model
from moetrain.cli import main
from moetrain.config import Config
from moetrain.memory import memory
from moetrain.testing import simulate_ranks

SIGMOID = pick("sigmoid", dropless=True)
CHOICES = [("experts",), ("router",), ("router", "experts")]


def frozen(config: Config, *parts: str) -> Config:
    train = config.train.model_copy(update={"freeze": parts})
    return config.model_copy(update={"train": train})


@pytest.mark.parametrize("parts", CHOICES, ids="-".join)
def test_ranks_train_the_rest_as_one_process_does(parts: tuple[str, ...]) -> None:
    config = frozen(pick("topk", dropless=True).config, *parts)
    text = pick("topk", dropless=True).text
    whole = alone(config, text)
    for name, value in whole.weights.items():
        is_frozen = any(f".{part}." in name for part in parts)
        assert torch.equal(value, whole.initial[name]) == is_frozen, name
    for layout in (Layout(4, ep=2, dp_replicate=1, micro=2), Layout(2, 2, 1, 4)):
        made = spread(config, layout)
        agree(simulate_ranks(layout.world, lambda made=made: on_rank(made, text)), whole)


def test_the_bias_of_a_frozen_router_stays() -> None:
    made = spread(frozen(SIGMOID.config, "router"), Layout(1, 1, 1, 8))
    (outcome,) = simulate_ranks(1, lambda: on_rank(made, SIGMOID.text))
    assert all(not bias.any() for bias in outcome.steps[-1].buffers.values())
    (moving,) = simulate_ranks(1, lambda: on_rank(frozen(made), SIGMOID.text))
    assert any(bias.any() for bias in moving.steps[-1].buffers.values())


def test_a_run_saves_no_moments_of_what_is_frozen_and_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, train={"freeze": ["experts"]})
    assert train(config) == 0
    run = tmp_path / "runs" / "run"
    saved = saved_tensors(checkpoint.resolve(run))
    with_moments = {name for name in saved if name.startswith("optimizer.")}
    assert with_moments
    assert not [name for name in with_moments if ".experts." in name]
    start = build_model(restore.find(run).config, 257)
    assert not start.blocks[1].moe.experts.w_down.requires_grad
    before = {n: t for n, t in saved.items() if ".experts." in n}
    assert train(config, "--train.steps", 10) == 0
    after = saved_tensors(checkpoint.resolve(run))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    router = "model.blocks.1.moe.router.weight"
    assert not torch.equal(after[router], saved[router])
    assert model_of(run).blocks[1].moe.experts.w_down.shape == (4, 16, 16)


def test_another_choice_is_named_when_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, train={"freeze": ["experts"]})
    assert train(config, "--train.steps", 3) == 0
    assert train(config, "--train.freeze", "router") == 2
    assert "train.freeze ([router]) was [experts]" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "batches"), [("torch", 1), ("torch", 2), ("deepspeed", 1)])
def test_neither_gradients_nor_moments_of_it_are_counted(kind: str, batches: int) -> None:
    base: Any = {
        "moe": {"experts": 8},
        "train": {"global_batch": 8 * batches, "micro_batch": 8},
        "engine": {"kind": kind, "zero_stage": 0},
    }
    config = Config.model_validate(base)
    rows = {}
    for name, made in (("all", config), ("none", frozen(config, "experts"))):
        rows[name] = dict(memory(made, build_model(made, 257), 257, 1))
    experts = 4 * 8 * 3 * 256 * 1024  # layers, experts, matrices of a SwiGLU expert
    assert rows["all"]["weights"] == rows["none"]["weights"]
    # Whole ones of all micro-batches but the last, too.
    assert rows["all"]["gradients"] - rows["none"]["gradients"] == 4 * batches * experts
    assert rows["all"]["Adam moments"] - rows["none"]["Adam moments"] == 8 * experts


def test_freezing_without_experts_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, moe={"experts": 0}, train={"freeze": ["router"]})
    assert main(["check", str(config), "--world-size", "1"]) == 0
    assert "train.freeze ([router]) has no effect when moe.experts is 0" in capsys.readouterr().err


def test_a_router_that_has_nothing_to_freeze_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, moe={"router": "hash"}, train={"freeze": ["router"]})
    assert main(["check", str(config), "--world-size", "1"]) == 0
    assert "has no effect with moe.router hash, which has no weights" in capsys.readouterr().err


def test_a_word_instead_of_a_list_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, train={"freeze": "experts"})
    assert main(["check", str(config), "--world-size", "1"]) == 2
    assert "train.freeze (experts) must be a list, such as [a, b]" in capsys.readouterr().err
