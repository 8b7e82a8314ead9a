"""What `moetrain checkpoint list`, `show` and `verify` print. Plain files: no process group."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from moetrain.checkpoint.checks import flat, is_model
from moetrain.checkpoint.folder import every, folder_of, resolve
from moetrain.checkpoint.manifest import MARKER, Manifest, TensorEntry, read_manifest, save_number
from moetrain.checkpoint.reading import dtype_of, open_checkpoint, position_of
from moetrain.constraints import spell
from moetrain.errors import UserError
from moetrain.tables import print_table, spell_bytes

DAMAGED = 2
FEW = 10
"""Tensors shown unless all are asked for."""
SHOWN_SETTINGS = (
    "name",
    "seed",
    "model.dim",
    "model.layers",
    "model.heads",
    "moe.experts",
    "moe.top_k",
    "moe.router",
    "moe.expert_ffn_dim",
    "moe.capacity_factor",
    "data.source",
    "data.tokenizer",
    "data.seq_len",
    "engine.kind",
    "engine.precision",
    "parallel.ep",
    "parallel.dp_replicate",
)
"""Settings by which people tell models and runs apart."""


class Listed(NamedTuple):
    """A directory among a run's checkpoints."""

    path: Path
    number: int
    """Of the save; 0 without a commit marker."""
    manifest: Manifest | None
    """None where it is missing or damaged."""
    state: str
    is_whole: bool
    """As far as the sizes of files tell."""


# ---------------------------------------------------------------- list


def print_list(path: Path) -> None:
    """Print every directory of the run, in order of saving, and which one `auto` would take."""
    folder = folder_of(path)
    # A save under way is the latest.
    listed = sorted(_listed(folder), key=lambda e: (e.path.suffix == ".partial", e.number, e.path))
    if not listed:
        raise UserError(f"{folder} holds no checkpoint")
    newest = [entry for entry in listed if entry.is_whole][-1:]
    print(folder)
    print_table(
        ("checkpoint", "save", "size", "tensors", "saved", "layout", "state", "auto"),
        ([*_row(entry), "takes this" if entry in newest else ""] for entry in listed),
    )


def _listed(folder: Path) -> Iterator[Listed]:
    for path in sorted(folder.iterdir()):
        if not (name := re.fullmatch(r"(step-\d{8,})(\.partial|\.replaced)?", path.name)):
            continue
        number = save_number(path)
        if name[2] == ".partial":
            yield Listed(path, number, None, "partial: being saved, or left by a killed one", False)
        elif name[2] and save_number(folder / name[1]) > number:
            yield Listed(path, number, None, "replaced by a later save of the step", False)
        else:
            yield _examined(path, number)


def _examined(path: Path, number: int) -> Listed:
    try:
        return Listed(path, number, open_checkpoint(path, hashed=False), "complete", True)
    except UserError as error:
        first, *more = str(error).removeprefix(f"{path}/").splitlines()
        rest = f" (and {len(more)} more)" if more else ""
    try:
        manifest = read_manifest(path)
    except UserError:
        manifest = None
    return Listed(path, number, manifest, f"damaged: {first}{rest}", False)


def _row(entry: Listed) -> list[object]:
    manifest = entry.manifest
    if manifest is None:
        return [entry.path.name, entry.number or "", "", "", "", "", entry.state]
    return [
        entry.path.name,
        entry.number,
        spell_bytes(manifest.total_bytes),
        len(manifest.tensors),
        _saved_at(entry.path),
        _layout(manifest),
        entry.state,
    ]


def _saved_at(path: Path) -> str:
    seconds = (path / MARKER).stat().st_mtime
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _layout(manifest: Manifest) -> str:
    """What its settings say of it; the number of ranks is not among them."""
    config = flat(manifest.extra.get("config"))
    names = {"ep": "parallel.ep", "dp_replicate": "parallel.dp_replicate", "engine": "engine.kind"}
    return ", ".join(f"{n} {config[key]}" for n, key in names.items() if key in config)


# ---------------------------------------------------------------- show


def print_checkpoint(path: Path, tensors: bool) -> None:
    """Print what a checkpoint holds; with `tensors` every one of them."""
    path = resolve(path)
    manifest = open_checkpoint(path, hashed=False)
    print(
        f"{path}: save {save_number(path)}, {_saved_at(path)}, {spell_bytes(manifest.total_bytes)}"
    )
    print(", ".join(f"{name} {value}" for name, value in position_of(manifest).items()))
    config = flat(manifest.extra.get("config"))
    known = [(name, spell(config[name])) for name in SHOWN_SETTINGS if name in config]
    if known:
        print()
        print_table(("setting", "value"), known)
    print()
    print_table(("part", "tensors", "elements", "bytes"), parts(manifest))
    print()
    names = sorted(manifest.tensors)
    shown = names if tensors else names[:FEW]
    entries = [(name, manifest.tensors[name]) for name in shown]
    rows = [(name, e.shape, e.dtype, len(e.pieces)) for name, e in entries]
    print_table(("tensor", "shape", "dtype", "pieces"), rows)
    if len(shown) < len(names):
        print(f"... and {len(names) - len(shown)} more; --tensors shows all")
    print()
    print_table(("file", "bytes", "sha256"), [(f.name, f.bytes, f.sha256) for f in manifest.files])


def parts(manifest: Manifest) -> list[tuple]:
    """Name, tensors, elements and bytes of weights, moments, buffers and the rest, where any."""
    totals: dict[str, list[int]] = {}
    for name, entry in manifest.tensors.items():
        numel = math.prod(entry.shape)
        sums = totals.setdefault(_part(name, manifest.tensors), [0, 0, 0])
        for place, add in enumerate((1, numel, numel * dtype_of(entry).itemsize)):
            sums[place] += add
    return [(part, *totals[part]) for part in sorted(totals, reverse=True)]


def _part(name: str, tensors: dict[str, TensorEntry]) -> str:
    if name.startswith("optimizer."):
        return "moments"
    if not is_model(name):
        return "other"
    # Without any moments, weights and buffers cannot be told apart.
    is_trained = f"optimizer.{name.removeprefix('model.')}.exp_avg" in tensors
    return "weights" if is_trained or all(map(is_model, tensors)) else "buffers"


# ---------------------------------------------------------------- verify


def verify(path: Path) -> int:
    """Read every byte of a checkpoint, or of all that a run has, and say what is damaged.

    Returns the exit code: 0, or 2 where anything is damaged.
    """
    code = 0
    for checkpoint in every(path):
        try:
            manifest = open_checkpoint(checkpoint, hashed=True)
        except UserError as error:
            if not checkpoint.exists():
                print(f"{checkpoint}: deleted meanwhile")
                continue
            code = DAMAGED
            print(f"{checkpoint}: damaged")
            print("\n".join(f"  {line}" for line in str(error).splitlines()))
        else:
            size = spell_bytes(manifest.total_bytes)
            print(f"{checkpoint}: ok ({len(manifest.tensors)} tensors, {size})")
    return code
