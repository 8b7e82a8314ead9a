from __future__ import annotations

import oracle
import pytest
import torch
from layers import SWITCH, build, experts_in, random_x
from strategies import close

from moetrain.moe.experts import _grouped, _looped


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [0, 4, 5, 0]])
def test_the_grouped_product_equals_the_loop(counts: list[int]) -> None:
    """Forward and both gradients, with experts that have no row."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 8, generator=generator, requires_grad=True)
    weight = torch.randn(4, 8, 16, generator=generator, requires_grad=True)
    cotangent = torch.randn(9, 16, generator=generator)
    results = []
    for product in (_looped, _grouped):
        y = product(rows, weight, counts)
        results.append((y, *torch.autograd.grad(y, (rows, weight), cotangent)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_experts_apply_their_own_weights_to_their_own_rows() -> None:
    """Both layouts of rows against one row at a time."""
    layer = build(SWITCH, 3)
    rows_eRD = random_x(3, 4)
    expected = [
        [oracle.run_expert(expert, row) for row in rows]
        for expert, rows in zip(experts_in(layer), rows_eRD, strict=True)
    ]
    expected_eRD = torch.stack([torch.stack(rows) for rows in expected])
    close(layer.experts(rows_eRD, None), expected_eRD)
    ragged = torch.cat([rows_eRD[0, :1], rows_eRD[2]])
    close(layer.experts(ragged, [1, 0, 4]), torch.cat([expected_eRD[0, :1], expected_eRD[2]]))
