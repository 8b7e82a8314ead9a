"""Keyed draws in unbounded integers: the judge of `moetrain.moe.keyed`."""

from __future__ import annotations

import hashlib


def hashed(key: int, value: int) -> int:
    """SplitMix64's output number `value` from the state `key`, both taken modulo 2^64."""
    word = (1 << 64) - 1
    z = (key + (value + 1) * 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return z ^ (z >> 31)


def hashed_token(seed: int, step: int, layer: int, purpose: str, token: int) -> int:
    word = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")
    key = 0
    for part in (seed, step, layer, word, token):
        key = hashed(key, part)
    return key
