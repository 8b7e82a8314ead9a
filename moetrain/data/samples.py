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
from moetrain.data.layouts import Cut, Layout, Packing, Whole
from moetrain.data.order import shuffled
from moetrain.data.shards import open_loss, open_offsets, open_tokens
from moetrain.data.splits import Split
from moetrain.errors import UserError
from moetrain.loss import IGNORED


class Batch(NamedTuple):
    """Sequences for one forward pass, on the CPU."""

    tokens_BL: Tensor
    """int64; padding holds the end-of-text id."""
    targets_BL: Tensor
    """int64, the token after each; IGNORED where there is no loss. With packing `cut` the first
    token of a document is a target like any other, predicted from the end of text before it."""
    valid_BL: Tensor
    """bool; False marks padding."""
    token_id_BL: Tensor
    """int64: sample index · L + position, different for every token of the run; 0 in a row that
    is all padding."""
    document_BL: Tensor | None
    """int64, the number of each token's document, 0 for padding; None where attention crosses
    documents."""


class Samples:
    """Sequences of `seq_len` tokens from a split."""

    def __init__(
        self,
        prepared: Prepared,
        split: Split,
        seq_len: int,
        seed: int,
        mask_documents: bool,
        packing: Packing = "cut",
    ) -> None:
        """Open a split.

        Args:
            prepared: what `prepare` returned.
            split: `train` comes shuffled by `seed`, epoch after epoch; `eval` comes in order.
            seq_len: tokens per sequence (one more is read for the last target).
            seed: chooses the order of `train`.
            mask_documents: number the documents inside each sequence; whole ones always are.
            packing: cut documents wherever a sequence is full, or keep them whole.

        Raises:
            UserError: the training text is shorter than one sequence, or files are damaged.
        """
        manifest = prepared.manifest
        self.split, self.seq_len, self.seed = split, seq_len, seed
        self.num_shortened = 0
        """Documents that lose their end, being longer than a sequence."""
        self._tokens = open_tokens(prepared.directory, manifest, split)
        self._in_loss = open_loss(prepared.directory, manifest, split)
        self._eos_id = manifest.eos_id
        self._offsets = None
        if mask_documents or packing == "whole":
            offsets = open_offsets(prepared.directory, manifest, split)
            self._offsets = offsets.read(0, len(offsets))
        self._layout: Layout = Cut(len(self._tokens), seq_len, drops_rest=split == "train")
        if packing == "whole":
            assert self._offsets is not None
            self._layout = Whole(self._offsets, seq_len)
            self.num_shortened = self._layout.num_shortened
        if len(self) == 0:
            num_tokens = len(self._tokens)
            raise UserError(
                f"data.seq_len ({seq_len}) needs {seq_len + 1} tokens, and the training part of "
                f"data.source ('{manifest.source}') has {num_tokens}; "
                f"set data.seq_len to at most {num_tokens - 1}, or add text"
            )

    def __len__(self) -> int:
        """Samples in one epoch; with packing `cut`, what is left of `train` after the last whole
        one is not used."""
        return len(self._layout)

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
        shape = len(sample_B), self.seq_len
        token_BL = np.full(shape, self._eos_id, dtype=np.int64)
        target_BL = np.full(shape, IGNORED, dtype=np.int64)
        valid_BL = np.zeros(shape, dtype=bool)
        document_BL = np.zeros(shape, dtype=np.int64)
        for row, sample in enumerate(sample_B):
            stretches = self._layout.stretches(sample) if sample >= 0 else []
            place = 0
            for stretch in stretches:
                here = row, slice(place, place + len(stretch))
                token_BL[here], target_BL[here] = self._read(stretch)
                document_BL[here] = self._documents(stretch)
                place += len(stretch)
            valid_BL[row, :place] = True
        position_L = np.arange(self.seq_len)
        id_BL = np.where(real_B[:, None], index_B[:, None] * self.seq_len + position_L, 0)
        return Batch(
            tokens_BL=torch.from_numpy(token_BL),
            targets_BL=torch.from_numpy(target_BL),
            valid_BL=torch.from_numpy(valid_BL),
            token_id_BL=torch.from_numpy(id_BL),
            document_BL=None if self._offsets is None else torch.from_numpy(document_BL),
        )

    def _read(self, stretch: range) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a stretch and their targets, IGNORED where these carry no loss."""
        tokens = self._tokens.read(stretch.start, stretch.stop + 1)
        targets = tokens[1:]
        if self._in_loss is not None:
            in_loss = self._in_loss.read(stretch.start + 1, stretch.stop + 1)
            targets = np.where(in_loss, targets, IGNORED)
        return tokens[:-1], targets

    def _documents(self, stretch: range) -> np.ndarray | int:
        """The number of each token's document."""
        if self._offsets is None:
            return 0
        return np.searchsorted(self._offsets, np.arange(stretch.start, stretch.stop), side="right")
