from __future__ import annotations

from collections.abc import Iterator

import oracle
import pytest
import torch
from layers import SWITCH, build, experts_in, random_x
from strategies import close
from torch import Tensor

from moetrain.moe.experts import _grouped, _looped, swiglu


@pytest.fixture
def _fresh_memory_is_nan() -> Iterator[None]:
    """What no kernel has written is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


COUNTS = pytest.mark.parametrize(
    "counts", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [0, 4, 5, 0], [0, 0, 0, 0]]
)


@pytest.mark.usefixtures("_fresh_memory_is_nan")
@COUNTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_equals_the_loop(dtype: torch.dtype, counts: list[int]) -> None:
    """Forward and both gradients, with experts that have no row, whatever memory held before."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows, weight = draw(sum(counts), 8).requires_grad_(), draw(4, 8, 16).requires_grad_()
    cotangent = draw(sum(counts), 16)
    results = []
    for product in (_looped, _grouped):
        y = product(rows, weight, counts)
        results.append((y, *torch.autograd.grad(y, (rows, weight), cotangent)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_grouped_product_takes_an_expanded_gradient() -> None:
    """Such as that of a sum."""
    rows, weight = torch.ones(5, 8, requires_grad=True), torch.ones(2, 8, 16, requires_grad=True)
    _grouped(rows, weight, [2, 3]).sum().backward()
    assert torch.equal(rows.grad, torch.full((5, 8), 16.0))  # type: ignore[arg-type]
    assert torch.equal(weight.grad[1], torch.full((8, 16), 3.0))  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 0], [40, 33, 1], [32, 0, 64]])
def test_rows_of_any_number_equal_those_of_plain_operations(
    dtype: torch.dtype, counts: list[int]
) -> None:
    """Output and every gradient, against one product after the other."""

    def plain(rows: Tensor, counts: list[int]) -> Tensor:
        hidden = swiglu(_looped(rows, experts.w_gate_up, counts))
        return _looped(hidden, experts.w_down, counts)

    results = []
    for packed in (True, False):
        experts = build(SWITCH, 3).experts.to(dtype)
        rows = random_x(1, sum(counts))[0].to(dtype).requires_grad_()
        y = (experts if packed else plain)(rows, counts)
        results.append(
            (y, *torch.autograd.grad(y.double().sin().sum(), (rows, *experts.parameters())))
        )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 6])
@pytest.mark.parametrize("counts", [None, [3, 0, 1, 2, 0, 4]])
def test_parts_compute_what_the_whole_does(counts: list[int] | None, num_parts: int) -> None:
    """Output and every gradient; in whichever order the parts run."""
    layer = build(SWITCH, 6)
    rows = random_x(6, 4) if counts is None else random_x(1, sum(counts))[0]
    size = 6 // num_parts
    sizes = [size] * num_parts
    if counts is not None:
        sizes = [sum(counts[i * size : (i + 1) * size]) for i in range(num_parts)]
    results = []
    for parts in (1, num_parts):
        leaf = rows.clone().requires_grad_()
        pieces = leaf.split(sizes) if parts > 1 else [leaf]
        products = layer.experts.split(parts)
        computed = {}
        for i in reversed(range(parts)):
            mine = counts and counts[i * 6 // parts : (i + 1) * 6 // parts]
            computed[i] = products[i](pieces[i], mine)
        y = torch.cat([computed[i] for i in range(parts)])
        weights = (layer.experts.w_gate_up, layer.experts.w_down)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (leaf, *weights))))
    for one, other in zip(*results, strict=True):
        close(one, other)


def test_a_part_without_rows_gets_gradient_zero() -> None:
    layer = build(SWITCH, 4)
    first, second = layer.experts.split(2)
    y = torch.cat([first(random_x(1, 3)[0], [1, 2]), second(random_x(1, 0)[0], [0, 0])])
    y.sum().backward()
    grad = layer.experts.w_down.grad
    assert grad is not None
    assert [bool(expert.abs().sum() > 0) for expert in grad] == [True, True, False, False]


def test_parts_must_be_equal() -> None:
    with pytest.raises(ValueError, match="4 experts cannot be cut into 3 equal parts"):
        build(SWITCH, 4).experts.split(3)


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
