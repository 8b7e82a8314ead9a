"""Layers whose experts are spread over ranks by any dispatcher, and what one step of them gives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from layers import HIDDEN
from oracle_gates import Router
from strategies import DIM, gate_of
from torch import Tensor

from moetrain.mesh import Mesh
from moetrain.moe import Draws, MoE, keyed
from moetrain.parallel import Dispatch, connect_experts

NUM_EXPERTS = 8


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Way(NamedTuple):
    """One way for tokens to reach their experts."""

    dispatch: Dispatch = "all_to_all"
    nodes: int = 1
    chunks: int = 1

    def __str__(self) -> str:
        return f"{self.dispatch}-{self.nodes}-{self.chunks}"


PLAIN = Way()


def every_way(num_ranks: int) -> list[Way]:
    """All there are for eight experts on so many ranks."""
    held = NUM_EXPERTS // num_ranks
    chunks = [n for n in (1, 2, 4) if held % n == 0]
    nodes = [n for n in (2, 4, 8) if num_ranks % n == 0]
    return [
        *(Way(chunks=n) for n in chunks),
        *(Way("two_level", m, n) for m in nodes for n in chunks),
        Way("all_gather"),
    ]


def connect(layer: MoE, way: Way) -> None:
    """Let all ranks share the layer's experts."""
    mesh = Mesh(torch.device("cpu"), ep=dist.get_world_size(), nodes=way.nodes)
    connect_experts(layer, mesh, way.dispatch, way.chunks)


def build(
    router: Router, factor: float | None, policy: str, experts: range, of: int = NUM_EXPERTS
) -> MoE:
    """The layer of so many experts, holding only those of `experts`."""
    layer = MoE(
        0,
        DIM,
        HIDDEN,
        of,
        gate_of(router),
        capacity_factor=factor,
        drop_policy=policy,  # type: ignore[arg-type]
    ).double()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(2 * random(*parameter.shape, seed=seed))
    for name, weight in list(layer.experts.named_parameters()):
        mine = weight.detach()[experts.start : experts.stop].clone()
        layer.experts.register_parameter(name, torch.nn.Parameter(mine))
    return layer


def step(layer: MoE, x_BLD: Tensor, valid_BL: Tensor, token_id_BL: Tensor) -> dict[str, Any]:
    """Forward and backward; everything that came of it."""
    x_BLD = x_BLD.clone().requires_grad_()
    draws = Draws(keyed.step_key(0, 1), token_id_BL.flatten())
    y_BLD, stats, *_ = layer(x_BLD, valid_BL, "train", draws, token_id_BL % 11)
    (y_BLD.sin().sum() + stats.balance_sum + stats.z_sum).backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y_BLD.detach(), "x": x_BLD.grad, "stats": stats, **grads}


def equal_but_for_rounding(actual: Tensor, expected: Tensor) -> None:
    """Sums of the same numbers in another order, in fp64."""
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * max(scale, 1))


def check_same(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """What the ranks hold adds up, or lies side by side, to what one process has."""
    for name, expected in alone.items():
        if name.startswith("router."):
            equal_but_for_rounding(torch.stack([rank[name] for rank in ranks]).sum(0), expected)
        elif name != "stats":
            equal_but_for_rounding(torch.cat([rank[name] for rank in ranks]), expected)
    for name in ("balance_sum", "z_sum"):
        parts = [getattr(rank["stats"], name) for rank in ranks]
        equal_but_for_rounding(torch.stack(parts).sum(), getattr(alone["stats"], name))
    for record in ("demand", "gate_mass"):
        columns = zip(*(getattr(rank["stats"], record) for rank in ranks), strict=True)
        for expected, parts in zip(getattr(alone["stats"], record), columns, strict=True):
            equal_but_for_rounding(torch.stack(parts).sum(0).double(), expected.double())
    for i, count in enumerate(alone["stats"].ledger):
        parts = [rank["stats"].ledger[i] for rank in ranks]
        assert torch.equal(torch.stack(parts).sum(0), count)
