"""What must hold of a run that was killed and resumed, beside the run that never was.

A check returns how many things it compared, and raises SoakError for the first that is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moetrain.checkpoint import read_manifest
from moetrain.checkpoint.folder import FOLDER
from moetrain.checkpoint.reading import open_checkpoint, read_tensor
from moetrain.errors import UserError
from moetrain.metrics import Speed
from moetrain.sinks import METRICS_FILE

from .worker import crc

Event = dict[str, Any]
Tensors = dict[str, Tensor]
History = dict[int, dict[int, int]]
"""For every step of a run, the samples that it was trained on: index and CRC of the tokens."""
NOT_COMPARED = {*Speed.__annotations__, "memory_gib"}
"""Fields of metrics.jsonl that are measured with a clock or a scale."""
BY_LAYOUT = {"outcomes_by_rank"}
"""Those that say which rank had what."""
TOLERANCE = 1e-9
"""Relative, between layouts in fp64."""
BAND = 0.01
"""Nats, between the losses of layouts and engines in fp32."""


class SoakError(Exception):
    """What was to survive did not."""


def require(holds: bool, message: str) -> None:
    """Raise SoakError unless it holds."""
    if not holds:
        raise SoakError(message)


# ---- journals ------------------------------------------------------------------------------------


def read_journals(folder: Path) -> list[list[Event]]:
    """The events of every rank that began to write."""
    return [
        [json.loads(line) for line in path.open(encoding="utf-8") if line.endswith("\n")]
        for path in sorted(folder.glob("rank-*.jsonl"))
    ]


def samples_by_step(journals: Sequence[Sequence[Event]]) -> History:
    """What all ranks of one start read, by step; SoakError where a sample was read twice."""
    found: History = {}
    for events in journals:
        step = 0
        for event in events:
            if event["event"] == "begin":
                step = event["step"]
            elif event["event"] == "read":
                read = found.setdefault(step, {})
                for index, tokens in event["samples"]:
                    require(index not in read, f"step {step} read sample {index} twice")
                    read[index] = tokens
    return found


def continued(history: History, loaded: int, later: History) -> History:
    """What survives when a run goes on from step `loaded`: what came after never happened."""
    kept = {step: samples for step, samples in history.items() if step <= loaded}
    return {**kept, **later}


def check_samples(history: History, whole: History, steps: int, batch: int) -> int:
    """Every step of the run has its global batch, every sample once, of the same tokens."""
    for step in range(1, steps + 1):
        wanted = set(range((step - 1) * batch, step * batch))
        found = history.get(step, {})
        require(
            found.keys() == wanted,
            f"step {step} was trained on samples {sorted(found)}, not on {sorted(wanted)}",
        )
        require(found == whole[step], f"step {step} has other tokens than the uninterrupted run's")
    require(max(history) == steps, f"the run of {steps} steps went on to {max(history)}")
    return steps


# ---- checkpoints ---------------------------------------------------------------------------------


def committed_steps(run: Path) -> list[int]:
    """Steps of the directories that have a checkpoint's final name, in order."""
    folder = run / FOLDER
    return sorted(int(path.name[5:]) for path in folder.glob("step-*") if not path.suffix)


def checkpoint_of(run: Path, step: int) -> Path:
    """Where a checkpoint lies."""
    return run / FOLDER / f"step-{step:08d}"


def check_committed(run: Path) -> int:
    """Every directory with a checkpoint's name is whole."""
    steps = committed_steps(run)
    for step in steps:
        path = checkpoint_of(run, step)
        try:
            open_checkpoint(path, hashed=True)
        except UserError as error:
            raise SoakError(f"a committed checkpoint does not verify: {error}") from error
    return len(steps)


def read_tensors(path: Path) -> Tensors:
    """All tensors of a checkpoint in full, put together from its files without DCP."""
    entries = read_manifest(path).tensors
    return {name: read_tensor(path, entry) for name, entry in entries.items()}


def _box(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    return tensor[tuple(slice(o, o + size) for o, size in zip(offsets, sizes, strict=True))]


def check_loaded(journals: Sequence[Sequence[Event]], ranks: int, step: int, saved: Tensors) -> int:
    """Every rank that loaded has the bits that were saved, and all ranks together all of them.

    Returns the number of tensors, or 0 where a kill came before every rank had loaded.
    """
    loads = [event for events in journals for event in events if event["event"] == "loaded"]
    for event in loads:
        require(
            event["step"] == step,
            f"resumed from step {event['step']}, but step {step} was committed last",
        )
        require(
            event["pieces"].keys() == saved.keys(), "tensors other than those saved were loaded"
        )
        for name, pieces in event["pieces"].items():
            for offsets, sizes, found in pieces:
                require(
                    crc(_box(saved[name], offsets, sizes)) == found,
                    f"{name} at {offsets} is not what the checkpoint of step {step} holds",
                )
    if len(loads) < ranks:
        return 0
    for name, tensor in saved.items():
        boxes = {(tuple(o), tuple(s)) for event in loads for o, s, _ in event["pieces"][name]}
        held = sum(math.prod(sizes) for _, sizes in boxes)
        require(held == tensor.numel(), f"of {name}, {held} of {tensor.numel()} elements are held")
    return len(saved)


def check_same_tensors(found: Tensors, wanted: Tensors, tolerance: float) -> int:
    """Two checkpoints hold the same: bit by bit, or relative to each tensor's largest element."""
    require(found.keys() == wanted.keys(), f"tensors differ: {found.keys() ^ wanted.keys()}")
    for name, tensor in found.items():
        other = wanted[name]
        if tolerance == 0:
            require(crc(tensor) == crc(other), f"{name} differs at the end")
        else:
            gap = (tensor - other).abs().max().item()
            limit = tolerance * other.abs().max().item()
            require(gap <= limit, f"{name} is off by {gap:.3g} at the end, above {limit:.3g}")
    return len(found)


# ---- metrics -------------------------------------------------------------------------------------


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl without what a clock measured; a torn one is an error."""
    text = (run / METRICS_FILE).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in NOT_COMPARED} for line in lines]


def check_lines(run: Path, whole: Path, tolerance: float) -> int:
    """Loss curve and ledger are those of the uninterrupted run: to the last bit, or (above 0) to a
    relative tolerance but for which rank had what."""
    lines, others = read_lines(run), read_lines(whole)
    _check_steps(lines, others)
    for line, other in zip(lines, others, strict=True):
        found = _difference(line, other, tolerance)
        require(found is None, f"step {line['step']}: {found}")
    return len(lines)


def check_losses(run: Path, whole: Path, band: float) -> int:
    """Every loss, of training and held out, lies within a band in nats."""
    gaps = loss_gaps(run, whole)
    largest = max(gaps, default=0)
    require(largest <= band, f"a loss is off by {largest:.4f} nats, above {band}")
    return len(gaps)


def loss_gaps(run: Path, whole: Path) -> list[float]:
    """How far every loss is from the uninterrupted run's, in nats."""
    lines, others = read_lines(run), read_lines(whole)
    _check_steps(lines, others)
    return [
        abs(line[key] - other[key])
        for line, other in zip(lines, others, strict=True)
        for key in ("loss", "eval_loss")
        if key in line
    ]


def check_ledgers(run: Path, whole: Path) -> int:
    """Every assignment is accounted for, and there are as many as in the uninterrupted run."""
    ledgers, others = (
        [(line["step"], layer) for line in read_lines(path) for layer in line.get("layers", [])]
        for path in (run, whole)
    )
    for (step, layer), (_, other) in zip(ledgers, others, strict=True):
        outcomes = sum(layer[key] for key in ("kept", "spilled", "dropped", "not_sampled"))
        require(
            layer["assigned"] == outcomes == sum(layer["load"]) == other["assigned"],
            f"step {step}: a ledger does not add up: {layer}",
        )
    return len(ledgers)


def _check_steps(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    steps, wanted = ([(line["step"], "loss" in line) for line in of] for of in (lines, others))
    require(steps == wanted, f"metrics.jsonl has lines of other steps: {steps}")


def _difference(found: Any, wanted: Any, tolerance: float) -> str | None:
    """Where two values of a line part."""
    if isinstance(found, Mapping):
        keys = (found.keys() | wanted.keys()) - (BY_LAYOUT if tolerance else set())
        parts = ((f"{key}: ", found.get(key), wanted.get(key)) for key in sorted(keys))
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        parts = (
            (f"{place}: ", *pair) for place, pair in enumerate(zip(found, wanted, strict=True))
        )
    elif isinstance(found, float) and isinstance(wanted, float):
        same = math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance)
        return None if same else f"{found} instead of {wanted}"
    else:
        return None if found == wanted else f"{found} instead of {wanted}"
    for where, one, other in parts:
        if (difference := _difference(one, other, tolerance)) is not None:
            return where + difference
    return None
