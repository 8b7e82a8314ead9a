"""What stands in `benchmarks/results/`: tables are what their numbers come to, by today's code."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import autopilot
import fits
import harness
import record
import scaling
import step
from contenders.report import report as layer_report


def collectives() -> ModuleType:
    """The benchmark; the tests have a module of this name, too."""
    path = record.ROOT / "benchmarks" / "collectives.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_collectives", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept(name: str) -> tuple[dict[str, Any], str]:
    """The numbers of a result, and its text without the setting."""
    data = json.loads((record.RESULTS / f"{name}.json").read_text())
    text = (record.RESULTS / f"{name}.md").read_text()
    return data, text.partition("## Setting\n")[0].rstrip()


def of_layer(data: dict[str, Any]) -> str:
    return layer_report(data["cells"]).rstrip()


def of_steps(data: dict[str, Any]) -> str:
    for cell in data["cells"]:
        shares = cell["mfu"] or {}
        cell["mfu"] = {name: harness.Spread(*share) for name, share in shares.items()} or None
    return step.report(data["cells"], data["profiles"], Namespace(**data["options"]))


def of_scaling(data: dict[str, Any]) -> str:
    kinds = {"exponent": fits.Exponent, "growth": harness.Spread, "limit_growth": harness.Spread}
    for curve in data["curves"]:
        curve.update({name: kind(*curve[name]) for name, kind in kinds.items()})
    return scaling.report(data["curves"], "scaling", Namespace(**data["options"]))


def of_collectives(data: dict[str, Any]) -> str:
    module = collectives()
    sizes = [module.Size(**size) for size in data["sizes"]]
    lines = {kind: fits.Transport(**line) for kind, line in data["lines"].items()}
    return module.report(sizes, lines, "collectives", data["ranks"], data["nodes"])


def of_autopilot(data: dict[str, Any]) -> str:
    return autopilot.report(data["runs"], data["steps"])


@pytest.mark.parametrize(
    ("name", "render"),
    [
        ("layer", of_layer),
        ("step", of_steps),
        ("scaling", of_scaling),
        ("collectives", of_collectives),
        ("autopilot", of_autopilot),
    ],
)
def test_a_result_says_what_its_numbers_come_to(name: str, render: Any) -> None:
    data, text = kept(name)
    assert render(data) == text
