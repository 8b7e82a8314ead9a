"""Reading a checkpoint as plain files: one process, no process group, a tensor at a time."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.checkpoint.checks import check_files, check_pieces, flat
from moetrain.checkpoint.manifest import (
    DamagedCheckpointError,
    Manifest,
    Piece,
    TensorEntry,
    dtype_name,
    read_manifest,
)


def open_checkpoint(path: Path, hashed: bool) -> Manifest:
    """Read the manifest, and hold files and pieces to it.

    Sizes are always compared, contents where `hashed`. Raises DamagedCheckpointError naming every
    damage, UserError for another version.
    """
    manifest = read_manifest(path)
    damages = []
    for check in (
        partial(check_files, path, manifest.files, hashed),
        partial(check_pieces, path, manifest),
    ):
        try:
            check()
        except DamagedCheckpointError as error:
            damages.append(str(error))
    if damages:
        raise DamagedCheckpointError("\n".join(damages))
    return manifest


def position_of(manifest: Manifest) -> dict[str, Any]:
    """Where the run stood, without the window of steps that spikes are told from."""
    found = flat(manifest.extra.get("position")) or {"step": manifest.step}
    return {name: value for name, value in found.items() if not isinstance(value, list)}


def dtype_of(entry: TensorEntry) -> torch.dtype:
    """The dtype that a manifest names."""
    return getattr(torch, entry.dtype)


def read_tensor(path: Path, entry: TensorEntry) -> Tensor:
    """One tensor of the checkpoint `path`, in full logical shape, on the CPU.

    Nothing is unpickled but by torch's weights-only loader. Raises DamagedCheckpointError where the
    content is not what the manifest says.
    """
    whole = torch.empty(entry.shape, dtype=dtype_of(entry))
    for piece in entry.pieces:
        ends = (start + size for start, size in zip(piece.offsets, piece.sizes, strict=True))
        box = tuple(slice(*ends) for ends in zip(piece.offsets, ends, strict=True))
        whole[box] = _read_piece(path, piece, whole.dtype)
    return whole


def _read_piece(path: Path, piece: Piece, dtype: torch.dtype) -> Tensor:
    where = f"{path / piece.file}, byte {piece.start}"
    with (path / piece.file).open("rb") as file:
        file.seek(piece.start)
        content = io.BytesIO(file.read(piece.bytes))
    try:
        tensor = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything
        raise DamagedCheckpointError(f"{where}: no tensor can be read: {error}") from error
    found = "no tensor"
    if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
        found = f"{list(tensor.shape)} {dtype_name(tensor.dtype)}"
    wanted = f"{piece.sizes} {dtype_name(dtype)}"
    if found != wanted:  # which might be broadcast or converted without a word
        raise DamagedCheckpointError(f"{where}: {found} instead of {wanted}")
    return tensor
