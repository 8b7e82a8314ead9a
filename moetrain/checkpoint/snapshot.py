"""A copy of the live tensors in host memory, so that training need not wait for a disk."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from moetrain.checkpoint.fragment import Fragment


@final
class Snapshot:
    """Memory for what this rank holds of a checkpoint's tensors, made once and filled again.

    It takes as many bytes of host memory as the tensors have on this rank; where it is pinned, for
    a GPU, up to twice as many.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy every tensor, and return the copies; once it returns, the tensors may change.

        The copies are valid until the next call, which must be of the same names and layouts.
        Tensors that lie in pieces (DTensor, Fragment) become Fragments, others stay as they are.
        """
        with torch.no_grad():
            if not self._copies:
                self._copies = {name: _empty_like(name, tensor) for name, tensor in tensors.items()}
            assert self._copies.keys() == tensors.keys()
            for name, copy in self._copies.items():
                _fill(copy, name, tensors[name])
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies to pinned memory return before they are done
        return dict(self._copies)


def _empty_like(name: str, tensor: Tensor) -> Tensor:
    if not hasattr(tensor, "__create_chunk_list__"):
        return _host_memory(tensor)
    pieces = []
    for chunk in tensor.__create_chunk_list__():  # type: ignore[attr-defined]
        if chunk.sizes.numel():  # a rank may hold nothing of it
            box = tuple(chunk.offsets), tuple(chunk.sizes)
            pieces.append((box, _host_memory(_shard(tensor, name, box[0]))))
    return Fragment(tensor.shape, tensor.dtype, pieces)


def _fill(copy: Tensor, name: str, tensor: Tensor) -> None:
    if not isinstance(copy, Fragment):
        copy.copy_(tensor, non_blocking=True)
        return
    for (offsets, _), memory in copy.pieces:
        memory.copy_(_shard(tensor, name, offsets), non_blocking=True)


def _shard(tensor: Tensor, name: str, offsets: tuple[int, ...]) -> Tensor:
    index = MetadataIndex(name, torch.Size(offsets))
    return tensor.__get_tensor_shard__(index)  # type: ignore[attr-defined]


def _host_memory(like: Tensor) -> Tensor:
    return torch.empty_like(like, device="cpu", pin_memory=like.is_cuda)
