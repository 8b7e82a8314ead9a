"""The path with a capacity never waits for the device, and can be captured as a CUDA graph; grouped
products of the dropless path."""

from __future__ import annotations

from typing import Any
from unittest import mock

import on_device
import pytest
import torch
from test_compile import WAYS

from moetrain.moe import Experts, experts

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.mark.parametrize(("kind", "policy"), WAYS)
def test_a_captured_layer_serves_every_step(kind: str, policy: Any) -> None:
    on_device.replays_on_new_tokens(on_device.capacity_layer(kind, policy), CUDA)


@pytest.mark.parametrize(("kind", "policy"), WAYS)
def test_a_layer_with_a_capacity_never_waits(kind: str, policy: Any) -> None:
    on_device.never_waits(on_device.capacity_layer(kind, policy), CUDA)


def test_a_dropless_layer_waits_for_its_counts() -> None:
    moe = on_device.capacity_layer("topk", "position")
    moe.factors["train"] = None
    with pytest.raises(RuntimeError, match="synchroniz"):
        on_device.never_waits(moe, CUDA)


def test_grouped_products() -> None:
    on_device.grouped_products_are_those_of_the_loop(CUDA)


@pytest.mark.parametrize(
    ("dtype", "counts", "grouped"),
    [
        (torch.bfloat16, [5, 1, 18, 8], 2),
        (torch.bfloat16, [5, 0, 19, 8], 0),
        (torch.float32, [5, 1, 18, 8], 0),
    ],
)
def test_which_experts_are_grouped(
    dtype: torch.dtype, counts: list[int], grouped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both products of experts that all have rows, in bf16; whichever it is, the result is that of
    fp32 up to rounding."""
    packed = Experts(len(counts), 16, 8)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in packed.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    rows_RD = torch.randn(sum(counts), 16, generator=generator)
    exact_RD, kernel = packed(rows_RD, counts), mock.Mock(side_effect=experts._grouped)
    monkeypatch.setattr(experts, "_grouped", kernel)
    found_RD = packed.to(CUDA, dtype)(rows_RD.to(CUDA, dtype), counts)
    assert kernel.call_count == grouped
    tolerance = 2**-5 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found_RD.cpu().float(), exact_RD, rtol=tolerance, atol=tolerance)
