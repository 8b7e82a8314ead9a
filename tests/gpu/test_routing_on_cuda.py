"""A CUDA device routes, draws, drops and learns what the CPU does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from moetrain.moe import Draws, Gate, MoE, keyed

pytestmark = pytest.mark.gpu

EXPERTS, DIM, SHAPE = 8, 16, (4, 32)
GATES = {
    "switch": Gate("switch", 1, jitter=0.1),
    "gshard": Gate("gshard", 2),
    "topk": Gate("topk", 3),
    "noisy_topk": Gate("noisy_topk", 2),
    "sigmoid": Gate("sigmoid", 4, groups=4, top_groups=2),
    "expert_choice": Gate("expert_choice", 2),
    "hash": Gate("hash", 2),
    "random": Gate("random", 2),
    "balanced": Gate("balanced", 2),
    "dense": Gate("dense", EXPERTS),
    "hierarchical": Gate("hierarchical", 4, groups=4, top_groups=2),
}


def build(gate: Gate, **options: Any) -> MoE:
    layer = MoE(3, DIM, 24, EXPERTS, gate, capacity_factor=options.pop("factor", 1.0), **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer.double()


def run(layer: MoE, device: str) -> dict[str, torch.Tensor]:
    """Outputs, losses, counts and gradients of one training pass, on the CPU."""
    layer = copy.deepcopy(layer).to(device)
    generator = torch.Generator().manual_seed(1)
    x_BLD = torch.randn(*SHAPE, DIM, generator=generator, dtype=torch.float64)
    valid_BL = torch.rand(SHAPE, generator=generator) < 0.9
    token_BL = torch.randint(0, 500, SHAPE, generator=generator)
    ids_T = torch.arange(valid_BL.numel(), device=device)
    x_BLD = x_BLD.to(device).requires_grad_()
    y_BLD, stats, *_ = layer(
        x_BLD,
        valid_BL.to(device),
        "train",
        Draws(keyed.step_key(5, 2, device), ids_T),
        token_BL.to(device),
    )
    (y_BLD.square().sum() + stats.balance_sum + stats.z_sum).backward()
    found = {"y": y_BLD, "balance": stats.balance_sum, "z": stats.z_sum, "x.grad": x_BLD.grad}
    found |= {f"ledger.{name}": value for name, value in stats.ledger._asdict().items()}
    found |= {f"{name}.grad": p.grad for name, p in layer.named_parameters()}
    return {name: value.detach().cpu() for name, value in found.items() if value is not None}


def same(layer: MoE) -> None:
    here, there = run(layer, "cpu"), run(layer, "cuda")
    assert here.keys() == there.keys()
    for name, value in here.items():
        if name.startswith("ledger"):
            assert torch.equal(value, there[name]), name
        torch.testing.assert_close(there[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("policy", ["position", "probability", "random", "spill"])
@pytest.mark.parametrize("name", GATES)
def test_a_layer_with_a_capacity(name: str, policy: Any) -> None:
    same(build(GATES[name], drop_policy=policy))


@pytest.mark.parametrize("name", [name for name in GATES if name != "expert_choice"])
def test_a_dropless_layer(name: str) -> None:
    same(build(GATES[name], factor=None))


def test_draws_are_the_same_in_every_bit() -> None:
    ids_T = torch.arange(100_000)
    for draw in (keyed.uniform, keyed.normal):
        here = draw(Draws(keyed.step_key(1, 2), ids_T), 3, "a purpose", 4)
        draws = Draws(keyed.step_key(1, 2, "cuda"), ids_T.cuda())
        assert torch.equal(here, draw(draws, 3, "a purpose", 4).cpu())
