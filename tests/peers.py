"""What the comparisons with peers share: tolerances, one group's loss, gradients, weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

import torch
from hypothesis import settings
from torch import Tensor

from moetrain.moe import Gate, MoE, Routing, balance

# Fixed cases: these are fp32, and a peer breaks ties as it likes.
FIXED = settings(max_examples=40, deadline=None, derandomize=True)


def every(tokens: int) -> Tensor:
    return torch.ones(tokens, dtype=torch.bool)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to a few roundings of fp32."""
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-6)


def balance_of(gate: Gate, record: Routing) -> Tensor:
    return balance.balance(gate, balance.demand(gate, record, len(record.valid_T)))[0]


def same_gradient(ours: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    close(*(torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (ours, theirs)))


def initialised(layer: MoE) -> MoE:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return layer


def weighted(values: Tensor) -> Tensor:
    """A scalar in which every entry has a weight of its own."""
    return (values.flatten() * torch.linspace(-1, 2, values.numel())).sum()


def table(expert_TK: Tensor, slot_TK: Tensor, gate_TK: Tensor, experts: int, slots: int) -> Tensor:
    """The weight with which each token reaches each slot: (T, E, C); expert −1 is none."""
    token_T1 = torch.arange(len(expert_TK))[:, None]
    cell_TK = (token_T1 * experts + expert_TK) * slots + slot_TK
    cell_TK = cell_TK.where(expert_TK >= 0, len(expert_TK) * experts * slots)
    empty = gate_TK.new_zeros(len(expert_TK) * experts * slots + 1)
    return empty.scatter(0, cell_TK.flatten(), gate_TK.flatten())[:-1].view(-1, experts, slots)


def renormalised_after_drops(gate_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """The weights as DeepSpeed defines them: those of the kept choices, adding up to 1."""
    kept_gate_TK = gate_TK.where(kept_TK, 0)
    total_T1 = kept_gate_TK.sum(1, keepdim=True)
    return kept_gate_TK / total_T1.clamp(min=torch.finfo(gate_TK.dtype).eps)


@contextmanager
def selection(deepspeed: ModuleType, uniform_TE: Tensor) -> Iterator[None]:
    """Let DeepSpeed's random token selection draw these numbers."""
    draws = {torch.device("cpu"): lambda _shape: uniform_TE}
    with patch.dict(deepspeed.exp_selection_uniform_map, draws):
        yield


def descending(tokens: int, experts: int) -> Tensor:
    """Draws with which the earlier token wins."""
    return torch.linspace(1, 0.5, tokens)[:, None].expand(tokens, experts)
