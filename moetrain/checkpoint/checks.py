"""What is compared before a checkpoint is used: its files, its pieces, the model, the settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from moetrain.checkpoint.manifest import (
    DamagedCheckpointError,
    FileEntry,
    Manifest,
    Piece,
    TensorEntry,
    digest,
    dtype_name,
)
from moetrain.constraints import spell
from moetrain.errors import UserError

SHAPING = ("model.", "moe.", "data.tokenizer", "train.freeze")
"""Settings, by how they begin, that decide which tensors there are."""


def check_files(path: Path, files: Iterable[FileEntry], hashed: bool) -> None:
    """Raise DamagedCheckpointError naming every file that is not as it was saved.

    Sizes are always compared, contents only where `hashed`.
    """
    found = {entry.name: _damage(path / entry.name, entry, hashed) for entry in files}
    if problems := [f"{path / name}: {problem}" for name, problem in found.items() if problem]:
        raise DamagedCheckpointError("\n".join(problems))


def _damage(file: Path, entry: FileEntry, hashed: bool) -> str | None:
    try:
        if not file.is_file():
            return "missing"
        if (size := file.stat().st_size) != entry.bytes:
            return f"{size} bytes instead of {entry.bytes}"
        if hashed and digest(file) != entry.sha256:
            return "content differs from its SHA-256"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def check_pieces(path: Path, manifest: Manifest) -> None:
    """Raise DamagedCheckpointError naming every tensor whose pieces do not make it up.

    They must cover its shape, each element once, and lie inside files of the checkpoint.
    """
    sizes = {file.name: file.bytes for file in manifest.files}
    lines = [
        f"{path}: {name} {entry}: {problem}"
        for name, entry in manifest.tensors.items()
        for problem in piece_problems(entry, sizes)
    ]
    if lines:
        raise DamagedCheckpointError("\n".join(lines))


def piece_problems(entry: TensorEntry, file_bytes: Mapping[str, int]) -> Iterator[str]:
    """What is wrong with the pieces of a tensor; `file_bytes` maps a file to its size."""
    for piece in entry.pieces:
        end = piece.start + piece.bytes
        if piece.start < 0 or piece.bytes < 0 or end > file_bytes.get(piece.file, 0):
            yield f"bytes {piece.start} to {end} are not in {piece.file}"
        if not _is_inside(piece, entry.shape):
            yield f"the piece at {piece.offsets} of {piece.sizes} reaches out of it"
            return
    held, numel = sum(math.prod(piece.sizes) for piece in entry.pieces), math.prod(entry.shape)
    if held != numel:
        yield f"its pieces hold {held} elements, not {numel}"
    for one, other in _overlaps(entry.pieces):
        yield f"the pieces at {one.offsets} and {other.offsets} overlap"


def _is_inside(piece: Piece, shape: list[int]) -> bool:
    if not len(piece.offsets) == len(piece.sizes) == len(shape):
        return False
    sides = zip(piece.offsets, piece.sizes, shape, strict=True)
    return all(start >= 0 and size >= 0 and start + size <= end for start, size, end in sides)


def _overlaps(pieces: list[Piece]) -> Iterator[tuple[Piece, Piece]]:
    """Pairs of pieces that share elements.

    A sweep along the dimension in which most pieces start at a place of their own, so that few
    have to be compared: a checkpoint of a thousand ranks has a thousand pieces a tensor.
    """
    pieces = [piece for piece in pieces if math.prod(piece.sizes)]
    num_dims = len(pieces[0].offsets) if pieces else 0
    starts = [len({piece.offsets[dim] for piece in pieces}) for dim in range(num_dims)]
    if not starts:  # of scalars any two do
        yield from pairwise(pieces)
        return
    dim, open_pieces = starts.index(max(starts)), list[Piece]()
    for piece in sorted(pieces, key=lambda piece: piece.offsets[dim]):
        here = piece.offsets[dim]
        open_pieces = [
            other for other in open_pieces if other.offsets[dim] + other.sizes[dim] > here
        ]
        yield from ((other, piece) for other in open_pieces if _meet(other, piece))
        open_pieces.append(piece)


def _meet(one: Piece, other: Piece) -> bool:
    sides = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in sides)


def check_tensors(
    path: Path,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    prefix: str,
    config: Mapping[str, Any] | None,
) -> None:
    """Raise UserError with a line per tensor that is missing, unknown, or of another kind.

    The settings of `config` (a run's own, nested) that may be the reason are named first.
    """
    saved = {name: str(e) for name, e in manifest.tensors.items() if name.startswith(prefix)}
    wanted = {name: f"{list(t.shape)} {dtype_name(t.dtype)}" for name, t in tensors.items()}
    different = [name for name in sorted(saved | wanted) if saved.get(name) != wanted.get(name)]
    if not different:
        return
    reason = f"{path} is of another model, {len(different)} tensors differ:"
    if all(map(is_model, saved)) and not any(map(is_model, different)):
        reason = f"{path} holds weights alone, and to train needs {len(different)} tensors more:"
    settings = changed_settings(manifest.extra.get("config"), config, SHAPING)
    lines = [
        f"{name}: {saved.get(name, 'absent')} saved, {wanted.get(name, 'absent')} wanted"
        for name in different
    ]
    raise UserError("\n  ".join([reason, *settings, *lines]))


def is_model(name: str) -> bool:
    """Whether a tensor is of the model, not of the optimizer: a weight or a buffer."""
    return name.startswith("model.")


def changed_settings(saved: object, own: object, prefixes: tuple[str, ...]) -> list[str]:
    """Settings of nested configurations that begin as given and differ: `moe.experts (8) was 4`.

    One that either does not know, because it is of another version, is left out.
    """
    before, now = flat(saved), flat(own)
    return [
        f"{name} ({spell(now[name])}) was {spell(before[name])}"
        for name in now
        if name.startswith(prefixes) and name in before and now[name] != before[name]
    ]


def flat(values: object, above: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by dotted name; of anything else, none."""
    found: dict[str, Any] = {}
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found
