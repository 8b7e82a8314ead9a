"""What a rank holds of a tensor, as checkpoints see it: boxes of the logical tensor.

ZeRO cuts flat buffers, not tensors, so what a rank holds of a moment is any range of its elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements start to stop of a row-major tensor, in order, as few boxes: 2·ndim − 1 at most.

    Every box is contiguous in the flat tensor.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        yield from _inside(shape, start, stop)
        return
    yield from _inside(shape, start, first * row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _inside(shape, last * row, stop)


def _inside(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The same for a range that leaves no row."""
    row = math.prod(shape[1:])
    number = start // row
    for offsets, sizes in boxes(shape[1:], start - number * row, stop - number * row):
        yield (number, *offsets), (1, *sizes)


class Fragment(Tensor):
    """Boxes of a tensor of logical `shape`, each with the memory that holds it.

    It has no operations; it is there to be saved and loaded by torch.distributed.checkpoint, whose
    protocol for tensors that lie in pieces it follows (DTensor does the same).
    """

    pieces: list[tuple[Box, Tensor]]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, pieces: list[tuple[Box, Tensor]]
    ) -> Fragment:
        """`pieces` may be empty."""
        device = pieces[0][1].device if pieces else torch.device("cpu")
        # A checkpoint reads shape and dtype from it.
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=device
        )
        made.pieces = pieces
        return made

    @classmethod
    def of_flat(cls, shape: tuple[int, ...], start: int, flat: Tensor) -> Fragment:
        """Elements `start`, `start` + 1 ... in the memory of `flat` (1-D, may be empty)."""
        pieces, done = [], 0
        for offsets, sizes in boxes(tuple(shape), start, start + flat.numel()):
            numel = math.prod(sizes)
            pieces.append(((offsets, sizes), flat[done : done + numel].view(sizes)))
            done += numel
        return cls(shape, flat.dtype, pieces)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """None is defined."""
        raise NotImplementedError(f"{func} of a fragment")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        held = ", ".join(f"{offsets}+{sizes}" for (offsets, sizes), _ in self.pieces)
        return f"Fragment({tuple(self.shape)}: {held})"

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """What to load."""
        return [_chunk(box) for box, _ in self.pieces]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        """What to save; ranks with the same box save it once."""
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The piece that begins there."""
        assert index.offset is not None
        return next(piece for (offsets, _), piece in self.pieces if offsets == tuple(index.offset))


def _chunk(box: Box) -> ChunkStorageMetadata:
    offsets, sizes = box
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
