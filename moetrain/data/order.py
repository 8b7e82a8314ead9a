"""The order in which samples are seen: a pure function of (seed, epoch, index), with no state."""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 8  # one 64-byte digest yields the eight 64-bit round keys


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Map each index in [0, n) to its place in the permutation of (seed, epoch).

    A balanced Feistel network permutes the smallest domain of an even number of bits that holds n;
    values that land past n are sent through again until they land inside (cycle walking, Black and
    Rogaway 2002). It needs no table, so an epoch of any size costs nothing to begin or to resume.

    Args:
        index: array of integers in [0, n).
        n: number of samples in the epoch, at least 1 and below 2^62.
        seed: the run's seed.
        epoch: number of the epoch, from 0.

    Returns:
        int64 array of index's shape. It depends on the arguments alone, on no random generator.
    """
    assert 1 <= n < 1 << 62, n
    keys = _round_keys(seed, epoch)
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    place = _feistel(np.asarray(index).astype(np.uint64), half_bits, keys)
    while (outside := place >= n).any():
        place[outside] = _feistel(place[outside], half_bits, keys)
    return place.astype(np.int64)


def shuffled(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Map global sample indices, which count on over epochs, to samples in [0, n); int64."""
    epoch_of, position = np.divmod(np.asarray(index, dtype=np.int64), n)
    sample = np.empty_like(position)
    for epoch in np.unique(epoch_of):
        chosen = epoch_of == epoch
        sample[chosen] = permute(position[chosen], n, seed, int(epoch))
    return sample


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"moetrain order {seed} {epoch}".encode(), digest_size=8 * ROUNDS)
    return np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)


def _feistel(value: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """Finalizer of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
