"""The page of faults names tests that are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def test_every_test_named_exists() -> None:
    where: dict[str, list[str]] = {}
    for path in ROOT.glob("tests/**/*.py"):
        for name in functions(path):
            where.setdefault(name, []).append(str(path.relative_to(ROOT)))
    moved = {
        f"{path}::{name}": where.get(name, [])
        for path, name in NAMED
        if path not in where.get(name, [])
    }
    assert moved == {}, "named on the page, and where a test of that name is"


def functions(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name


def test_every_fault_has_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    assert len(NAMED) > len(rows) > 40
    for row in rows:
        fault, happens, test = (cell.strip() for cell in row.strip("|").split(" | "))
        assert fault
        assert happens
        assert test == "test" or "::test_" in test, row
