"""One MoE layer, forward and backward: moetrain, other systems, and the limit of matrix products.

    python benchmarks/layer.py [--tokens 2048 8192] [--shapes e8] [--dtypes bf16] [--only moetrain]
        [--routing balanced] [--ep 1] [--rounds 7] [--device cpu] [--add] [--profile]

All get the same tokens, weights and choices, and are checked against an fp64 reference before any
timing. The limit is the experts' matrix products on sorted rows in equal groups, and nothing else.
Without arguments the whole grid of the device: on CPUs 32,768 tokens in fp32 take longest, and a
GPU gets the widths of Mixtral and OLMoE. bf16 is left out where the machine has no instructions for
it. Peers are optional: see requirements-peers.txt. Writes layer.{json,md} into results/ (layer-cuda
on a GPU).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import harness
import operators
import record
import torch
from contenders import limit, own, peers
from contenders.case import Facts
from contenders.cell import DTYPES, Cell, Routing, Shape, reference
from contenders.report import LARGE, fastest_peer, report
from harness import AbsentError, Contender, Field, Sample, usual_dtype

SHAPES = {
    "e8": Shape(512, 1024, 8, 2),
    "e64": Shape(512, 512, 64, 8),
    "mixtral": Shape(4096, 14336, 8, 2),
    "olmoe": Shape(2048, 1024, 64, 8),
}
USUAL: dict[str, tuple[list[str], list[int]]] = {
    "cpu": (["e8", "e64"], [2048, 8192, 32_768]),
    "cuda": (["mixtral", "olmoe"], [16_384]),
}
"""Shapes and tokens, by device."""
ALWAYS = ("limit", LARGE, "moetrain")
"""What the others are compared with."""
PROFILED = ("limit", "moetrain", "moetrain dropless")
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Distance from the reference in relation to its size: outputs, and input gradients."""
ENOUGH_S = 12.0
"""A cell's rounds, beyond the first three."""


class System(NamedTuple):
    """A contender at any number of ranks."""

    build: Any
    first_on_path: Path | None = None
    alone: str = ""
    """Why it takes part on one rank only, if so."""
    is_for_gpus: bool = False
    """Whether it is left out on CPUs."""


ALONE = "its block does not spread experts over ranks"
SYSTEMS = {
    "limit": System(limit.Limit),
    "limit, given memory": System(limit.Given),
    LARGE: System(limit.Large, is_for_gpus=True),
    "moetrain": System(own.capacity),
    "moetrain dropless": System(own.dropless),
    "DeepSpeed": System(peers.deepspeed),
    "DeepSpeed einsum": System(peers.deepspeed_einsum, peers.FOLDER),
    "Mixtral eager": System(peers.hugging_face_eager, alone=ALONE),
    "Mixtral grouped": System(peers.hugging_face_grouped, alone=ALONE),
    "torchtitan": System(peers.torchtitan, peers.FOLDER),
}


def main() -> None:
    options = arguments()
    name = record.name_on(options.device, "layer")
    found: list[dict[str, Any]] = []
    kept = earlier(name) if options.add else []
    for ranks in options.ep:
        if options.device == "cuda" and torch.cuda.device_count() < ranks:
            print(f"EP {ranks} is left out: {torch.cuda.device_count()} GPUs are there", flush=True)
            continue
        with Field(contenders(options.only, ranks, options.device), options.device) as field:
            for shape, dtype in itertools.product(options.shapes, options.dtypes):
                wrong = check(field, SHAPES[shape], dtype, ranks, options.device)
                for tokens, routing in itertools.product(options.tokens, options.routing):
                    cell = Cell(SHAPES[shape], tokens, routing, dtype, ranks)
                    found.append(measure(field, cell, wrong, options.rounds))
                    if options.profile:
                        field.clear()
                        fastest = fastest_peer(found[-1]["systems"])
                        names = [*PROFILED, *([fastest] if fastest else [])]
                        found[-1]["profiles"] = profiles(cell, names, options.device)
                    whole = join(kept, found)  # written each time: a run may be cut short
                    record.write(name, {"cells": whole}, report(whole), device=options.device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One MoE layer against other systems' layers.")
    add, shapes = parser.add_argument, "; ".join(f"{name}: {s}" for name, s in SHAPES.items())
    add("--tokens", type=int, nargs="+", help="the usual of a device, as --shapes")
    add("--shapes", nargs="+", choices=SHAPES, help=shapes)
    add("--dtypes", nargs="+", choices=DTYPES, help="usually fp32, and bf16 if the device has it")
    add("--routing", nargs="+", choices=get_args(Routing), default=list(get_args(Routing)))
    add("--ep", type=int, nargs="+", default=[1, 2], help="ranks that share the experts")
    add("--rounds", type=int, default=7, help=f"at most; three where they take {ENOUGH_S:.0f} s")
    add("--only", nargs="+", choices=SYSTEMS, help="besides the limit and moetrain")
    harness.add_device(parser)
    add(
        "--profile",
        action="store_true",
        help=f"say where {', '.join(PROFILED)} and the fastest peer spend their time",
    )
    add("--add", action="store_true", help="keep the results of cells that are not measured now")
    options = parser.parse_args()
    usual_shapes, usual_tokens = USUAL[options.device]
    options.shapes = options.shapes or usual_shapes
    options.tokens = options.tokens or usual_tokens
    options.dtypes = options.dtypes or list(dict.fromkeys([usual_dtype(options.device), "fp32"]))
    for shape in options.shapes:
        for tokens, ranks in itertools.product(options.tokens, options.ep):
            if problem := Cell(SHAPES[shape], tokens, "balanced", "bf16", ranks).problem():
                parser.error(problem)
    harness.require_at_least(parser, options, rounds=1)
    return options


def contenders(only: Sequence[str] | None, ranks: int, device: harness.Device) -> list[Contender]:
    """Those that can take part on so many ranks of such a device."""
    chosen = SYSTEMS if only is None else {*ALWAYS, *only}
    return [
        Contender(name, system.build, ranks, system.first_on_path)
        for name, system in SYSTEMS.items()
        if name in chosen
        and not (ranks > 1 and system.alone)
        and not (device == "cpu" and system.is_for_gpus)
    ]


def check(field: Field, shape: Shape, dtype: str, ranks: int, device: str) -> dict[str, str]:
    """On a small layer where nothing is dropped: those that compute something else, and how far
    they are from an fp64 reference."""
    small = shape._replace(dim=max(64, shape.experts), expert_dim=32)
    cell = Cell(small, 64 * ranks, "balanced", dtype, ranks, is_checked=True)
    y_TD, x_grad_TD = (t.cpu() for t in reference(cell, torch.device(device)))
    wrong = {}
    for name, answer in field.build(cell).items():
        if isinstance(answer, AbsentError) or answer[0].y_TD is None:
            continue
        far = max(
            _distance([facts.y_TD for facts in answer], y_TD),
            _distance([facts.x_grad_TD for facts in answer], x_grad_TD),
        )
        if not far < TOLERANCE[dtype]:
            wrong[name] = f"{far:.2g} away from the reference (relative, on a small layer)"
    return wrong


def _distance(parts: Sequence[torch.Tensor], wanted: torch.Tensor) -> float:
    return float((torch.cat(list(parts)).double() - wanted).norm() / wanted.norm())


def measure(field: Field, cell: Cell, wrong: dict[str, str], rounds: int) -> dict[str, Any]:
    """Everything about a cell, as it is kept; says on the way what came of it."""
    print(cell, flush=True)
    answers = field.build(cell)
    samples = field.measure(rounds, enough_s=ENOUGH_S)
    systems: dict[str, Any] = {}
    for name, system in SYSTEMS.items():
        if name in answers:
            systems[name] = _entry(answers[name], samples.get(name), wrong.get(name))
        elif cell.ranks > 1 and system.alone:
            systems[name] = {"absent": system.alone}
        else:
            continue
        print(f"  {name:20} {_line(systems[name])}", flush=True)
    where = record.setting(field.device)
    keys = ["command", "date", "commit", "processor", "instructions", "cores", "gpu"]
    installed = record.versions("torch", "deepspeed", "transformers")
    beside = record.versions("deepspeed", "torchtitan", folder=peers.FOLDER)
    kept = {**{key: where[key] for key in keys if key in where}, "versions": [*installed, *beside]}
    return {"cell": {**cell._asdict(), "shape": cell.shape._asdict()}, **kept, "systems": systems}


def profiles(
    cell: Cell, names: Sequence[str], device: harness.Device
) -> dict[str, list[dict[str, Any]]]:
    """The operators of a step, by system; of several ranks those of the first."""
    print("  profiling", flush=True)
    found = {}
    for name in names:  # one at a time: the largest cells take all memory there is
        system = SYSTEMS[name]
        build = partial(operators.Profiled, system.build)
        with Field([Contender(name, build, cell.ranks, system.first_on_path)], device) as field:
            answer = field.build(cell)[name]
        if not isinstance(answer, AbsentError):
            found[name] = answer[0]
    return found


def _entry(
    answer: list[Facts] | AbsentError, sample: Sample | None, wrong: str | None
) -> dict[str, Any]:
    if isinstance(answer, AbsentError) or sample is None:
        return {"absent": str(answer)}
    if any(facts.is_as_wanted is False for facts in answer):
        wrong = "chooses other experts"
    return {
        "seconds": sample.seconds,
        "flops": sum(facts.flops for facts in answer),
        "executed": sum(facts.executed for facts in answer),
        "kept": sum(facts.kept for facts in answer),
        "assigned": sum(facts.assigned for facts in answer),
        "peak_bytes": sample.peak_bytes,
        "remark": answer[0].remark,
        "wrong": wrong,
    }


def _line(entry: dict[str, Any]) -> str:
    if "absent" in entry:
        return f"absent: {entry['absent']}"
    seconds = sorted(entry["seconds"])[len(entry["seconds"]) // 2]
    rate, peak = entry["flops"] / seconds / 1e9, entry["peak_bytes"] / 2**20
    remark = entry["wrong"] or entry["remark"]
    return f"{1e3 * seconds:9.1f} ms  {rate:7.0f} useful GFLOP/s  {peak:6.0f} MiB  {remark}"


def earlier(name: str) -> list[dict[str, Any]]:
    """The cells of the last result."""
    path = record.RESULTS / f"{name}.json"
    return json.loads(path.read_text())["cells"] if path.exists() else []


def join(before: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells of an earlier run that were not measured again on such a machine, and those of this
    one."""
    again = [_place(entry) for entry in found]
    return [entry for entry in before if _place(entry) not in again] + found


def _place(entry: dict[str, Any]) -> tuple[dict[str, Any], str]:
    return entry["cell"], entry.get("gpu", entry["instructions"])


if __name__ == "__main__":
    main()
