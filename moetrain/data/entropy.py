"""What simple models of bytes score on the held-out text: what a language model must beat."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

SYMBOLS = 257
"""Byte values, and the end of a document."""
CHUNK = 1 << 22
"""Bytes counted at once, which take eight times as much memory."""


def count_pairs(texts: Iterable[str]) -> np.ndarray:
    """How often each byte follows each, int64 (257, 257); 256 stands between documents."""
    parts = [np.array([SYMBOLS - 1], dtype=np.uint16)]
    for text in texts:
        parts += [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16), parts[0]]
    symbols = np.concatenate(parts)
    counts = np.zeros(SYMBOLS**2, dtype=np.int64)
    for begin in range(0, len(symbols) - 1, CHUNK):
        chunk = symbols[begin : begin + CHUNK + 1].astype(np.int64)
        counts += np.bincount(chunk[:-1] * SYMBOLS + chunk[1:], minlength=SYMBOLS**2)
    return counts.reshape(SYMBOLS, SYMBOLS)


def byte_entropy(train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Score held-out bytes under add-one-smoothed counts of the training bytes.

    Args:
        train: pair counts of the training text, from `count_pairs`.
        held_out: pair counts of the held-out text.

    Returns:
        `unigram` and `bigram`: nats spent on the bytes and on the ends of documents, over the
        number of bytes: what a model of raw bytes must beat.
    """
    unigram, seen = train.sum(axis=0) + 1, train + 1
    log_unigram = np.log(unigram / unigram.sum())
    log_bigram = np.log(seen / seen.sum(axis=1, keepdims=True))
    num_bytes = held_out[:, :-1].sum()
    return {
        "unigram": float(-(held_out.sum(axis=0) * log_unigram).sum() / num_bytes),
        "bigram": float(-(held_out * log_bigram).sum() / num_bytes),
    }
