"""A CUDA device trains what one CPU process trains: alone under NCCL, compiled, on either engine,
and with experts spread over as many devices as there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import on_device
import pytest
import torch
from layouts import CASES, Case, Layout, pick

from moetrain.stragglers import Probe

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
TOPK, TOPK_DROPLESS = (pick("topk", dropless=dropless) for dropless in (False, True))
BOTH = pytest.mark.parametrize("case", [TOPK, TOPK_DROPLESS], ids=str)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_gate(case: Case) -> None:
    on_device.trains_as_the_reference(case, CUDA, precision="fp64")


@BOTH
def test_fp32(case: Case) -> None:
    on_device.trains_as_the_reference(case, CUDA, precision="fp32")


@BOTH
def test_bf16(case: Case) -> None:
    on_device.trains_in_bf16_within_the_band(case, CUDA)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@BOTH
def test_recomputation(case: Case, recompute: str) -> None:
    engine = {"activation_checkpointing": recompute}
    on_device.trains_as_the_reference(case, CUDA, precision="fp64", **engine)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("kind", ["topk", "switch", "gshard", "sigmoid"])
def test_compiled(kind: str, recompute: str) -> None:
    torch._dynamo.reset()
    engine = {"compile": True, "activation_checkpointing": recompute}
    case = pick(kind, dropless=False)
    on_device.trains_as_the_reference(case, CUDA, precision="fp64", **engine)


def test_the_grouped_kernel() -> None:
    on_device.grouped_training_is_that_of_the_loop(TOPK_DROPLESS, CUDA)


# ---- processes -----------------------------------------------------------------------------------


def ways_of(layout: Layout, *kinds: tuple[Case, dict[str, Any], dict[str, Any]]) -> list[Any]:
    """A case, settings of the engine and settings of the transport each."""
    ways = []
    for case, engine, parallel in kinds:
        config = on_device.config_of(case, layout, **engine)
        transport = config.parallel.model_copy(update=parallel)
        ways.append((case, config.model_copy(update={"parallel": transport})))
    return ways


def zero(stage: int) -> dict[str, Any]:
    return {"kind": "deepspeed", "zero_stage": stage, "precision": "fp32"}


FULL = {"activation_checkpointing": "full"}


def test_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    layout = Layout(1, ep=1, dp_replicate=1, micro=8)
    ways = [(TOPK, zero(stage), {}) for stage in range(3)]
    ways += [(TOPK_DROPLESS, zero(2), {})]
    on_device.ranks_train_as_the_reference(1, ways_of(layout, *ways), tmp_path)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_two_devices(tmp_path: Path) -> None:
    layout = Layout(2, ep=2, dp_replicate=1, micro=4)
    ways = [
        (TOPK, {}, {}),
        (TOPK_DROPLESS, FULL, {"overlap_chunks": 4}),
        (TOPK, FULL, {"dispatch": "all_gather"}),
        (TOPK, zero(1), {"overlap_chunks": 2}),
        (TOPK_DROPLESS, zero(2), {}),
    ]
    on_device.ranks_train_as_the_reference(2, ways_of(layout, *ways), tmp_path)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("layout", [Layout(4, 2, 1, 4), Layout(4, 2, 2, 4)], ids=str)
def test_four_devices(layout: Layout, tmp_path: Path) -> None:
    ways = ways_of(layout, (TOPK, {}, {}), (TOPK_DROPLESS, FULL, {"overlap_chunks": 2}))
    on_device.ranks_train_as_the_reference(4, ways, tmp_path)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four devices")
def test_two_levels(tmp_path: Path) -> None:
    levels = {"dispatch": "two_level", "nodes": 2}
    ways = [(TOPK, {}, levels), (TOPK_DROPLESS, {}, {**levels, "overlap_chunks": 2})]
    layout = Layout(4, ep=4, dp_replicate=1, micro=4)
    on_device.ranks_train_as_the_reference(4, ways_of(layout, *ways), tmp_path)


def test_the_probe_of_slow_ranks_times_the_device() -> None:
    assert Probe(CUDA).seconds() > 0
