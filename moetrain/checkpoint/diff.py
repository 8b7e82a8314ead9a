"""What `moetrain checkpoint diff` prints. Plain files: no process group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.checkpoint.checks import flat
from moetrain.checkpoint.folder import resolve
from moetrain.checkpoint.reading import open_checkpoint, position_of, read_tensor
from moetrain.constraints import spell
from moetrain.tables import print_table

DIFFERENT = 1
"""The exit code, as of diff(1)."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Difference(NamedTuple):
    """How two tensors of one shape and dtype differ."""

    num_elements: int
    """How many have other bits."""
    max_abs: float
    """The largest difference, in fp64; NaN where one side has one."""


def compare(one: Tensor, other: Tensor) -> Difference:
    """Compare bit by bit, so that NaN equals itself and -0 is not 0."""
    integers = _INTEGERS[one.dtype.itemsize]
    differs = one.view(integers) != other.view(integers)
    if not differs.any():
        return Difference(0, 0.0)
    gaps = (one[differs].double() - other[differs].double()).abs()
    return Difference(gaps.numel(), float(gaps.max()))


def print_diff(left: Path, right: Path) -> int:
    """Print how two checkpoints differ: settings, position, tensors.

    Returns the exit code: 0 where the tensors are the same bit by bit, else 1.
    """
    paths = [resolve(path) for path in (left, right)]
    one, other = (open_checkpoint(path, hashed=True) for path in paths)
    print(f"A: {paths[0]}\nB: {paths[1]}")
    _print_values("setting", one.extra.get("config"), other.extra.get("config"))
    _print_values("position", position_of(one), position_of(other))

    kinds = [{name: str(entry) for name, entry in m.tensors.items()} for m in (one, other)]
    unlike = [n for n in sorted(kinds[0] | kinds[1]) if kinds[0].get(n) != kinds[1].get(n)]
    rows = [(name, *(kind.get(name, "absent") for kind in kinds)) for name in unlike]
    _print_section("tensor", ("A", "B"), rows)

    alike = [name for name in sorted(one.tensors) if name not in unlike]
    changed = []
    for name in alike:
        pair = (read_tensor(p, m.tensors[name]) for p, m in zip(paths, (one, other), strict=True))
        elements, max_abs = compare(*pair)
        if elements:
            changed.append((name, elements, f"{max_abs:.3g}"))
    _print_section("tensor", ("elements that differ", "largest difference"), changed)
    print(
        f"\n{len(alike) - len(changed)} tensors are equal bit by bit, {len(changed)} have other "
        f"values, {len(unlike)} are absent or of another kind in one"
    )
    return DIFFERENT if changed or unlike else 0


def _print_values(subject: str, left: object, right: object) -> None:
    a, b = flat(left), flat(right)
    names = [name for name in a | b if a.get(name) != b.get(name)]
    rows = [(n, *(spell(side[n]) if n in side else "absent" for side in (a, b))) for n in names]
    _print_section(subject, ("A", "B"), rows)


def _print_section(subject: str, columns: tuple[str, ...], rows: Sequence[tuple]) -> None:
    if rows:
        print()
        print_table((subject, *columns), rows)
