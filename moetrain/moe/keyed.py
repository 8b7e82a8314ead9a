"""Random numbers that are a pure function of what they are for.

A draw depends on (seed, step, layer, purpose, token) and on nothing else: no generator state, so it
does not change with the layout, on resume or under recomputation. The hash is SplitMix64's
finaliser (Steele, Lea, Flood 2014), applied once for every part of the key.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


class Draws(NamedTuple):
    """What a layer needs to draw for its tokens in training; evaluation has none."""

    step_key: Tensor
    """int64, 0-d: `step_key(seed, step)`; a tensor so that a new step is not a new graph."""
    token_id_T: Tensor
    """int64 (T,): global token ids, unique over the whole run."""


def _wrap(value: int) -> int:
    """The int64 with the low 64 bits of an integer."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _wrap(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _wrap(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _wrap(0x94D049BB133111EB)


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    # int64's >> copies the sign bit down; the mask makes it the unsigned shift.
    return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))


def fold(key: Tensor, value: Tensor | int) -> Tensor:
    """Hash one more part into a key: int64 in, int64 out, broadcasting."""
    stride = (value + 1) * _GOLDEN
    x = key + (_wrap(stride) if isinstance(stride, int) else stride)
    x = _xor_shift(x, 30) * _MULTIPLY_1
    x = _xor_shift(x, 27) * _MULTIPLY_2
    return _xor_shift(x, 31)


def step_key(seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """The key of one optimizer step: int64, 0-d."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return fold(fold(zero, seed), step)


def purpose_key(draws: Draws, layer: int, purpose: str) -> Tensor:
    """The key of one kind of draw in one layer at one step: int64, 0-d."""
    return fold(fold(draws.step_key, layer), _number(purpose))


@torch.compiler.assume_constant_result  # hashlib cannot be traced
def _number(purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")


def token_keys(draws: Draws, layer: int, purpose: str, columns: int | None = None) -> Tensor:
    """A hash for every token: int64 (T,), or (T, columns) where `columns` is given."""
    key_T = fold(purpose_key(draws, layer, purpose), draws.token_id_T)
    if columns is None:
        return key_T
    return fold(key_T[:, None], torch.arange(columns, device=key_T.device))


def uniform(draws: Draws, layer: int, purpose: str, columns: int | None = None) -> Tensor:
    """Independent U[0, 1) draws for every token.

    Returns fp32 (T,), or (T, columns) where `columns` is given; multiples of 2^-24.
    """
    key = token_keys(draws, layer, purpose, columns)
    return ((key >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def normal(draws: Draws, layer: int, purpose: str, columns: int | None = None) -> Tensor:
    """Independent N(0, 1) draws for every token: fp32, shaped as `uniform` does.

    The inverse of the distribution function in fp64, so that devices agree once rounded.
    """
    key = token_keys(draws, layer, purpose, columns)
    midpoint = (((key >> 11) & ((1 << 53) - 1)).to(torch.float64) + 0.5) * 2.0**-53
    return torch.special.ndtri(midpoint).to(torch.float32)
