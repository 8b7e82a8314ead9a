"""The batch of a case, cut for a layout, and edits that bring an edge case about.

Shape suffixes as in `adapter`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from moetrain.testing.conformance.adapter import Adapter, Case, Layout, Tensors, Tokens

VOCABULARY = 64
STEER = 1000.0
"""A weight that no other can outweigh."""


def draw(name: str, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """Normal numbers in fp64 that depend on the name alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def batch(case: Case) -> Tokens:
    """The whole batch. The first entry of every vector is 1, so that weights can steer."""
    shape = case.sequences, case.length
    x_BLD = draw("x", (*shape, case.dim))
    x_BLD[:, :, 0] = 1
    id_BL = torch.arange(case.sequences * case.length).view(shape)
    return Tokens(
        x_BLD.to(case.dtype),
        torch.ones(shape, dtype=torch.bool),
        (id_BL * 7 + id_BL // 5) % VOCABULARY,
        id_BL,
        draw("weight", (*shape, case.dim)).to(case.dtype),
    )


def given_state(state: Tensors) -> dict[str, Tensor]:
    """Weights for every name, of every expert another: what the layer is to compute with."""
    return {
        name: draw(name, tuple(value.shape), max(1, value.shape[-1]) ** -0.5).to(value.dtype)
        for name, value in state.items()
    }


def cut(tokens: Tokens, layout: Layout, rank: int) -> list[Tokens]:
    """The calls of a rank: consecutive sequences."""
    parts = [entry.tensor_split(layout.ranks * layout.calls) for entry in tokens]
    mine = range(rank * layout.calls, (rank + 1) * layout.calls)
    return [Tokens(*(part[i] for part in parts)) for i in mine]


Edit = Callable[[Adapter, dict[str, Tensor], Tokens], tuple[dict[str, Tensor], Tokens]]
"""Changes weights or tokens for one run."""


def plain(_: Adapter, state: dict[str, Tensor], tokens: Tokens) -> tuple[dict[str, Tensor], Tokens]:
    """Nothing unusual."""
    return state, tokens


def padded(
    _: Adapter, state: dict[str, Tensor], tokens: Tokens
) -> tuple[dict[str, Tensor], Tokens]:
    """The last quarter of every other sequence is padding."""
    valid_BL = tokens.valid_BL.clone()
    valid_BL[::2, -(valid_BL.shape[1] // 4) :] = False
    return state, tokens._replace(valid_BL=valid_BL)


def padded_otherwise(
    adapter: Adapter, state: dict[str, Tensor], tokens: Tokens
) -> tuple[dict[str, Tensor], Tokens]:
    """The same padding with other content."""
    state, tokens = padded(adapter, state, tokens)
    other_BLD = 30 * draw("padding", tuple(tokens.x_BLD.shape)).to(tokens.x_BLD.dtype)
    x_BLD = tokens.x_BLD.where(tokens.valid_BL[:, :, None], other_BLD)
    return state, tokens._replace(x_BLD=x_BLD)


def more_padding(
    _: Adapter, state: dict[str, Tensor], tokens: Tokens
) -> tuple[dict[str, Tensor], Tokens]:
    """The batch twice over, all of the second half padding."""
    twice = Tokens(*(torch.cat([entry, entry]) for entry in tokens))
    valid_BL = twice.valid_BL.clone()
    valid_BL[len(tokens.valid_BL) :] = False
    return state, twice._replace(valid_BL=valid_BL)


def last_half_padded(
    _: Adapter, state: dict[str, Tensor], tokens: Tokens
) -> tuple[dict[str, Tensor], Tokens]:
    """The second half of the batch, all that some ranks have, is padding."""
    valid_BL = tokens.valid_BL.clone()
    valid_BL[len(valid_BL) // 2 :] = False
    return state, tokens._replace(valid_BL=valid_BL)


def few_sequences(
    _: Adapter, state: dict[str, Tensor], tokens: Tokens
) -> tuple[dict[str, Tensor], Tokens]:
    """One sequence alone: other ranks have none."""
    return state, Tokens(*(entry[:1] for entry in tokens))


def tied(
    adapter: Adapter, state: dict[str, Tensor], tokens: Tokens
) -> tuple[dict[str, Tensor], Tokens]:
    """Routers of zeros: every logit is the same."""
    return _without_router(adapter, 0, state), tokens


def starved(
    adapter: Adapter, state: dict[str, Tensor], tokens: Tokens
) -> tuple[dict[str, Tensor], Tokens]:
    """No token wants the last expert."""
    weight_ED = state[adapter.router(0)].clone()
    weight_ED[-1, 0] = -STEER
    return {**state, adapter.router(0): weight_ED}, tokens


def unbiased(
    adapter: Adapter, state: dict[str, Tensor], tokens: Tokens
) -> tuple[dict[str, Tensor], Tokens]:
    """Logits alone decide."""
    name = adapter.router(0)
    logits = {name: state[name]} if name in state else {}
    return {**_without_router(adapter, 0, state), **logits}, tokens


def collapsed(
    adapter: Adapter, state: dict[str, Tensor], tokens: Tokens
) -> tuple[dict[str, Tensor], Tokens]:
    """Both layers want the same expert."""
    return _collapse(adapter, state, (0, 0)), tokens


def collapsed_apart(
    adapter: Adapter, state: dict[str, Tensor], tokens: Tokens
) -> tuple[dict[str, Tensor], Tokens]:
    """Either layer wants one expert, not the same."""
    return _collapse(adapter, state, (0, -1)), tokens


def _collapse(
    adapter: Adapter, state: dict[str, Tensor], wanted: tuple[int, int]
) -> dict[str, Tensor]:
    for layer, expert in enumerate(wanted):
        state = _without_router(adapter, layer, state)
        state[adapter.router(layer)][expert, 0] = 4
    return state


def _without_router(adapter: Adapter, layer: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for all that the router of a layer has."""
    module, dot, name = adapter.router(layer).rpartition(".")
    prefix = module + dot if dot else name
    return {n: torch.zeros_like(v) if n.startswith(prefix) else v for n, v in state.items()}
