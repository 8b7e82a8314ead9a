"""A flat run of elements as boxes."""

from __future__ import annotations

import math

import pytest
import torch

from moetrain.checkpoint.fragment import Fragment, boxes


@pytest.mark.parametrize(
    "shape", [(7,), (1,), (3, 4), (1, 5, 1), (3, 1, 2), (2, 3, 4), (2, 2, 2, 2)]
)
def test_boxes_hold_a_range_in_order_and_are_few(shape: tuple[int, ...]) -> None:
    """Every range of every shape."""
    whole = torch.arange(math.prod(shape)).view(shape)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            found = list(boxes(shape, start, stop))
            assert len(found) <= 2 * len(shape) - 1
            parts = [
                whole[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))] for box in found
            ]
            elements = [element for part in parts for element in part.flatten().tolist()]
            assert elements == list(range(start, stop))


def test_a_fragment_shares_its_memory() -> None:
    flat = torch.zeros(7)
    fragment = Fragment.of_flat((3, 4), 3, flat)
    assert fragment.shape == (3, 4)
    for (offsets, _), piece in fragment.pieces:
        piece.fill_(offsets[0] + 1)
    assert flat.tolist() == [1, 2, 2, 2, 2, 3, 3]


def test_a_fragment_may_be_empty_and_computes_nothing() -> None:
    fragment = Fragment.of_flat((2, 3), 4, torch.zeros(0, dtype=torch.float64))
    assert fragment.pieces == []
    assert (fragment.shape, fragment.dtype) == ((2, 3), torch.float64)
    with pytest.raises(NotImplementedError):
        fragment + 1
