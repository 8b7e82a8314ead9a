"""Batches of packed token sequences.

Letters: B sequences, L tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moetrain.data.cache import Prepared
from moetrain.data.order import shuffled
from moetrain.data.shards import open_offsets, open_tokens
from moetrain.data.splits import Split
from moetrain.errors import UserError
from moetrain.loss import IGNORED


class Batch(NamedTuple):
    """Sequences for one forward pass, on the CPU."""

    tokens_BL: Tensor
    """int64; padding holds the end-of-text id."""
    targets_BL: Tensor
    """int64, the token after each; IGNORED where there is no loss. The first token of a document
    is a target like any other, predicted from the end of text before it."""
    valid_BL: Tensor
    """bool; False marks padding."""
    token_id_BL: Tensor
    """int64: sample index · L + position, different for every token of the run; 0 in a row that
    is all padding."""
    document_BL: Tensor | None
    """int64, documents counted from 0 in each sequence; None unless masks were asked for."""


class Samples:
    """Sequences of `seq_len` tokens, cut one after the other from a split."""

    def __init__(
        self,
        prepared: Prepared,
        split: Split,
        seq_len: int,
        seed: int,
        mask_documents: bool,
    ) -> None:
        """Open a split.

        Args:
            prepared: what `prepare` returned.
            split: `train` comes shuffled by `seed`, epoch after epoch; `eval` comes in order.
            seq_len: tokens per sequence (one more is read for the last target).
            seed: chooses the order of `train`.
            mask_documents: number the documents inside each sequence.

        Raises:
            UserError: the training text is shorter than one sequence, or files are damaged.
        """
        manifest = prepared.manifest
        self.split, self.seq_len, self.seed = split, seq_len, seed
        self._tokens = open_tokens(prepared.directory, manifest, split)
        self._num_tokens = len(self._tokens)
        self._eos_id = manifest.eos_id
        self._offsets = None
        if mask_documents:
            offsets = open_offsets(prepared.directory, manifest, split)
            self._offsets = offsets.read(0, len(offsets))
        if len(self) == 0:
            raise UserError(
                f"data.seq_len ({seq_len}) needs {seq_len + 1} tokens, and the training part of "
                f"data.source ('{manifest.source}') has {self._num_tokens}; "
                f"set data.seq_len to at most {self._num_tokens - 1}, or add text"
            )

    def __len__(self) -> int:
        """Samples in one epoch; what is left of `train` after the last whole one is not used."""
        if self.split == "train":
            return (self._num_tokens - 1) // self.seq_len
        return -(-(self._num_tokens - 1) // self.seq_len)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Read some samples.

        Args:
            indices: `train`: global sample indices, which count on over epochs; `eval`: indices
                below len(self). -1 asks for a row of padding.

        Raises:
            UserError: a block of a file is damaged.
        """
        index_B = np.asarray(indices, dtype=np.int64)
        real_B = index_B >= 0
        sample_B = index_B.copy()
        if self.split == "train":
            sample_B[real_B] = shuffled(index_B[real_B], len(self), self.seed)
        assert sample_B.max(initial=-1) < len(self), (indices, len(self))
        rows_BL1 = np.stack([self._read(sample) for sample in sample_B])
        target_BL = rows_BL1[:, 1:]
        position_L = np.arange(self.seq_len)
        id_BL = np.where(real_B[:, None], index_B[:, None] * self.seq_len + position_L, 0)
        valid_BL = target_BL != IGNORED
        token_BL = np.where(valid_BL, rows_BL1[:, :-1], self._eos_id)
        return Batch(
            tokens_BL=torch.from_numpy(token_BL),
            targets_BL=torch.from_numpy(target_BL.copy()),
            valid_BL=torch.from_numpy(valid_BL),
            token_id_BL=torch.from_numpy(id_BL),
            document_BL=self._documents(sample_B),
        )

    def _read(self, sample: int) -> np.ndarray:
        """Tokens of one sample and the one after it; IGNORED past the end and for sample -1."""
        row = np.full(self.seq_len + 1, IGNORED, dtype=np.int64)
        if sample >= 0:
            start = sample * self.seq_len
            tokens = self._tokens.read(start, min(start + len(row), self._num_tokens))
            row[: len(tokens)] = tokens
        return row

    def _documents(self, sample_B: np.ndarray) -> Tensor | None:
        if self._offsets is None:
            return None
        start_B1 = np.maximum(sample_B, 0)[:, None] * self.seq_len
        position_BL = start_B1 + np.arange(self.seq_len)
        document_BL = np.searchsorted(self._offsets, position_BL, side="right")
        return torch.from_numpy(document_BL - document_BL[:, :1])
