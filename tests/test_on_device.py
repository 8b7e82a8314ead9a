"""The CPU does what tests/gpu asks of CUDA: the same tests, so that they run wherever the suite
does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import on_device
import pytest
import torch
from layouts import Case, Layout, pick
from test_compile import WAYS

CPU, META = torch.device("cpu"), torch.device("meta")
TOPK, TOPK_DROPLESS = (pick("topk", dropless=dropless) for dropless in (False, True))


@pytest.mark.parametrize("case", [TOPK, TOPK_DROPLESS], ids=str)
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_training(case: Case, precision: str) -> None:
    on_device.trains_as_the_reference(case, CPU, precision=precision)


@pytest.mark.parametrize("case", [TOPK, TOPK_DROPLESS], ids=str)
def test_training_in_bf16(case: Case) -> None:
    on_device.trains_in_bf16_within_the_band(case, CPU)


def test_the_band_of_bf16_can_be_left() -> None:
    """By a gradient that is a tenth too large."""
    grads = {"weight": torch.ones(4)}
    assert on_device.gap({"weight": 1.1 * grads["weight"]}, grads) > on_device.GRADIENT_BAND


def test_a_rank_under_torchrun(tmp_path: Path) -> None:
    """More of them, as processes of Gloo, have tests of their own."""
    layout = Layout(1, ep=1, dp_replicate=1, micro=8)
    ways = [(case, on_device.config_of(case, layout)) for case in (TOPK, TOPK_DROPLESS)]
    on_device.ranks_train_as_the_reference(1, ways, tmp_path, CUDA_VISIBLE_DEVICES="")


def test_grouped_products() -> None:
    on_device.grouped_products_are_those_of_the_loop(CPU)


def test_training_with_grouped_products() -> None:
    on_device.grouped_training_is_that_of_the_loop(TOPK_DROPLESS, CPU)


@pytest.mark.parametrize(("kind", "policy"), WAYS)
def test_a_pass_on_tensors_in_place(kind: str, policy: Any) -> None:
    on_device.replays_on_new_tokens(on_device.capacity_layer(kind, policy), CPU)


@pytest.mark.parametrize(("kind", "policy"), WAYS)
def test_a_layer_with_a_capacity_reads_nothing(kind: str, policy: Any) -> None:
    on_device.never_waits(on_device.capacity_layer(kind, policy), META)


def test_a_dropless_layer_reads_its_counts() -> None:
    moe = on_device.capacity_layer("topk", "position")
    moe.factors["train"] = None
    with pytest.raises(RuntimeError):
        on_device.never_waits(moe, META)
