"""How the documents of a split lie in its sequences: cut where a sequence is full, or kept whole.

A stretch is a range of tokens that stand in a sequence one after the other; the target of each is
the token after it.

Letters: N documents.
"""

from __future__ import annotations

from typing import Literal, Protocol, final

import numpy as np

Packing = Literal["cut", "whole"]


class Layout(Protocol):
    """The sequences of a split."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def stretches(self, sample: int) -> list[range]:
        """What a sequence holds, in order."""
        ...


@final
class Cut:
    """Documents end to end, cut every `seq_len` tokens: one stretch each, whatever it holds."""

    def __init__(self, num_tokens: int, seq_len: int, drops_rest: bool):
        """`drops_rest` leaves out what remains after the last full sequence."""
        self._seq_len, self._num_targets, self._drops_rest = seq_len, num_tokens - 1, drops_rest

    def __len__(self) -> int:
        full, rest = divmod(self._num_targets, self._seq_len)
        return full + (rest > 0 and not self._drops_rest)

    def stretches(self, sample: int) -> list[range]:
        """See `Layout`."""
        start = sample * self._seq_len
        return [range(start, min(start + self._seq_len, self._num_targets))]


@final
class Whole:
    """Whole documents, a stretch each: none is cut that would fit into a sequence by itself."""

    def __init__(self, offset_N1: np.ndarray, seq_len: int):
        """`offset_N1` (int64): where each document begins, and at last the number of tokens."""
        length_N = np.diff(offset_N1) - 1  # the last token, the end of text, is a target alone
        self.num_shortened = int((length_N > seq_len).sum())
        """Documents that are longer than a sequence, and lose their end."""
        self._start_N, self._length_N = offset_N1, np.minimum(length_N, seq_len)
        self._rows = pack(self._length_N, seq_len)

    def __len__(self) -> int:
        return len(self._rows)

    def stretches(self, sample: int) -> list[range]:
        """See `Layout`."""
        starts = ((int(self._start_N[n]), int(self._length_N[n])) for n in self._rows[sample])
        return [range(start, start + length) for start, length in starts]


def pack(length_N: np.ndarray, room: int) -> list[list[int]]:
    """Documents of such lengths (at most `room`) in rows of `room` tokens: their numbers, by row.

    Best fit, the longest first: each goes where it leaves the least room, or begins a row
    (2404.10830 §3.2). A function of its arguments alone.
    """
    rows: list[list[int]] = []
    waiting: list[list[int]] = [[] for _ in range(room + 1)]  # rows, by the room they have left
    has_room = 0  # bit r: some row has room r left
    for document in np.argsort(-length_N, kind="stable").tolist():
        length = int(length_N[document])
        if fitting := has_room >> length:
            left = length + (fitting & -fitting).bit_length() - 1
            row = waiting[left].pop()
            if not waiting[left]:
                has_room ^= 1 << left
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(document)
        if rest := left - length:
            waiting[rest].append(row)
            has_room |= 1 << rest
    return rows
