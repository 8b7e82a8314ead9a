"""What a check finds: a verdict, and the comparisons that lead to one."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

Status = Literal["holds", "fails", "not exposed", "not supported"]


class Verdict(NamedTuple):
    """Whether an invariant holds for a system, and what was seen."""

    status: Status
    detail: str = ""


class InvariantError(Exception):
    """The numbers seen contradict the invariant."""


class NotExposedError(Exception):
    """The system does not show what the invariant is about; the reason."""


class NotSupportedError(Exception):
    """The system refuses the case that the invariant is about; the reason."""


def require(condition: bool | Tensor, seen: str) -> None:
    """Raise `InvariantError` with what was seen instead."""
    if not condition:
        raise InvariantError(seen)


def shown(adapter: Any, field: str, value: T | None) -> T:
    """A field of `Pass` that a check cannot do without."""
    if value is None:
        raise NotExposedError(adapter.hidden.get(field, f"{field} is not shown"))
    return value


_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Of the largest entry: how far apart orders of summation may lead."""


def is_close(actual: Tensor | float, expected: Tensor | float, dtype: torch.dtype) -> bool:
    """Equal up to the rounding of sums in `dtype`."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    if actual.shape != expected.shape or not actual.isfinite().all():
        return False
    if actual.numel() == 0:
        return True
    size = max(expected.abs().max().item(), actual.abs().max().item())
    return (actual - expected).abs().max().item() <= _TOLERANCE[dtype] * max(size, 1e-3)


def ratio(actual: Tensor | float, expected: Tensor | float) -> str:
    """The factor between two tensors, and how well it explains their difference."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)} rather than {tuple(expected.shape)}"
    square = expected.square().sum()
    if square == 0:
        return f"norm {actual.norm():.4g} rather than 0"
    factor = (actual * expected).sum() / square
    rest = (actual - factor * expected).norm() / actual.norm().clamp(min=1e-300)
    shape = "" if rest < 1e-4 else f" (and {rest:.1%} of it points elsewhere)"
    return f"{factor:.5g} × the reference{shape}"
