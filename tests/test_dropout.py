"""Expert dropout, against a loop over tokens, choices and units with a draw in plain integers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import HIDDEN, LAYER, TOP2, build
from oracle_draws import hashed, hashed_token
from strategies import DIM
from torch import Tensor

from moetrain.moe import Draws, MoE, keyed
from moetrain.moe.dropout import LEVELS, drop_units, split_keys, with_keys
from moetrain.moe.layer import Mode

SEED, STEP, SHARE, FIRST_TOKEN = 5, 3, 0.4, 1 << 40
LENGTH = 6


def stays(token: int, unit: int) -> bool:
    """Whether a unit is computed for a token, by the definition."""
    key = hashed_token(SEED, STEP, LAYER, "expert dropout", token)
    quarter = hashed(key, unit // 4) >> 16 * (unit % 4) & 0xFFFF
    return quarter >= round(SHARE * 65536)


def literal(layer: MoE, x_TD: Tensor) -> Tensor:
    """The layer's output, unit by unit; top-2 gates that add up to 1, nothing dropped."""
    scale = 65536 / (65536 - round(SHARE * 65536))
    rows = []
    for t, x in enumerate(x_TD):
        prob = (layer.router.weight @ x).softmax(0)
        best = prob.argsort(descending=True)[:2]
        y = torch.zeros(DIM, dtype=torch.float64)
        for expert in best.tolist():
            gate_up = layer.experts.w_gate_up[expert]
            for unit in range(HIDDEN):
                if stays(FIRST_TOKEN + t, unit):
                    gate, up = x @ gate_up[:, unit], x @ gate_up[:, HIDDEN + unit]
                    hidden = gate * torch.sigmoid(gate) * up * scale
                    share = prob[expert] / prob[best].sum()
                    y = y + share * hidden * layer.experts.w_down[expert, unit]
        rows.append(y)
    return torch.stack(rows)


def run(layer: MoE, x_TD: Tensor, mode: Mode = "train") -> Tensor:
    tokens = torch.arange(FIRST_TOKEN, FIRST_TOKEN + len(x_TD))
    x_BLD, draws = x_TD.view(-1, LENGTH, DIM), Draws(keyed.step_key(SEED, STEP), tokens)
    valid_BL = torch.ones(x_BLD.shape[:2], dtype=torch.bool)
    return layer(x_BLD, valid_BL, mode, draws).y_BLD.flatten(0, 1)


@pytest.fixture
def x_TD() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2 * LENGTH, DIM, generator=generator).double().requires_grad_()


@pytest.mark.parametrize("factor", [None, 9.0], ids=["dropless", "slots"])
def test_outputs_and_gradients_are_those_of_the_loop(x_TD: Tensor, factor: float | None) -> None:
    layer = build(TOP2, 4, capacity_factor=factor, expert_dropout=SHARE)
    inputs = [x_TD, *layer.parameters()]
    weights = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(1)).double()
    for mine, theirs in zip(
        (y := run(layer, x_TD), *torch.autograd.grad((y * weights).sum(), inputs)),
        (y := literal(layer, x_TD), *torch.autograd.grad((y * weights).sum(), inputs)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert {stays(FIRST_TOKEN + t, unit) for t in range(12) for unit in range(5)} == {False, True}


@pytest.mark.parametrize("mode", ["eval", "generate"])
def test_outside_training_nothing_is_left_out(x_TD: Tensor, mode: Mode) -> None:
    with_dropout, without = build(TOP2, 4, expert_dropout=SHARE), build(TOP2, 4)
    assert torch.equal(run(with_dropout, x_TD, mode), run(without, x_TD, mode))


def test_it_needs_draws(x_TD: Tensor) -> None:
    layer = build(TOP2, 4, expert_dropout=SHARE)
    x_BLD = x_TD.view(-1, LENGTH, DIM)
    valid_BL = torch.ones(x_BLD.shape[:2], dtype=torch.bool)
    with pytest.raises(ValueError, match="expert dropout draws at random in training"):
        layer(x_BLD, valid_BL, "train", None)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9), st.sampled_from([2, 4]))
def test_keys_survive_every_precision(keys: list[int], size: int) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32}[size]
    key_T, x_TD = torch.tensor(keys), torch.randn(len(keys), 3).to(dtype)
    rows_TD, found_T = split_keys(with_keys(x_TD, key_T))
    assert torch.equal(found_T, key_T)
    assert torch.equal(rows_TD, x_TD)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
def test_the_share_is_as_wanted_and_the_mean_stays(share: float) -> None:
    key_T = keyed.fold(torch.tensor(3), torch.arange(4000))
    kept = drop_units(torch.ones(4000, 50), key_T, share)
    n, dropped = kept.numel(), (kept == 0).double().mean().item()
    assert abs(dropped - share) < 5 * math.sqrt(share * (1 - share) / n) + 1 / LEVELS
    assert kept.max().item() == pytest.approx(1 / (1 - share), rel=1e-4)
    by_unit = (kept == 0).double().mean(0)
    assert (by_unit - share).abs().max() < 6 * math.sqrt(share * (1 - share) / 4000)
