"""The manifest: what a checkpoint holds, where it lies, and how it is known to be unchanged."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from moetrain.errors import UserError

VERSION: Literal[1] = 1
MARKER = "COMMITTED"
MANIFEST = "manifest.json"
# A plain name: a manifest cannot point out of its directory.
FileName = Annotated[str, Field(pattern=r"^(\.metadata|__\d+_\d+\.distcp)$")]
_SEAL = re.compile(rb"([1-9]\d*) [0-9a-f]{64}\n")


class DamagedCheckpointError(UserError):
    """A file of the checkpoint is missing, has another size or other content than was saved."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Piece(_Record):
    """A box of a tensor and the bytes of a file that hold it (a `torch.save` of the box)."""

    offsets: list[int]
    sizes: list[int]
    file: FileName
    start: int
    bytes: int


class TensorEntry(_Record):
    """A tensor in its full logical shape; `dtype` as in torch, without the prefix: float32."""

    shape: list[int]
    dtype: str
    pieces: list[Piece]

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


class FileEntry(_Record):
    """Size and checksum of a file at the time of the save."""

    name: FileName
    bytes: int
    sha256: str


class Manifest(_Record):
    """What a checkpoint holds. `extra` is the dict given to `save`."""

    version: Literal[1] = VERSION
    step: int
    extra: dict[str, JsonValue]
    files: list[FileEntry]
    tensors: dict[str, TensorEntry]

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest and verify it against the commit marker.

    Raises DamagedCheckpointError if either is missing or changed, UserError for another version.
    """
    file = Path(path) / MANIFEST
    try:
        marker, content = (Path(path) / MARKER).read_bytes(), file.read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(f"{error.filename}: {error.strerror}") from error
    if marker != seal(save_number(Path(path)), content):
        raise DamagedCheckpointError(f"{file} is not what {MARKER} was written for")
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{file} is not of version {VERSION}: {where}: {first['msg']}") from error


def save_number(path: Path) -> int:
    """Return the number of the save as the commit marker gives it; 0 without a valid marker."""
    try:
        marker = _SEAL.fullmatch((path / MARKER).read_bytes())
    except OSError:
        return 0
    return int(marker[1]) if marker else 0


def seal(number: int, manifest: bytes) -> bytes:
    """Return the content of the commit marker: a checksum that covers number and manifest."""
    checksum = hashlib.sha256(b"%d\n" % number + manifest).hexdigest()
    return f"{number} {checksum}\n".encode()


def build_manifest(
    step: int, extra: dict[str, Any], files: list[FileEntry], metadata: Metadata
) -> Manifest:
    """Translate DCP's index of a save; raises ValidationError where `extra` is not JSON."""
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), f"{name} is not a tensor"
        tensors[name] = TensorEntry(
            shape=list(entry.size),
            dtype=dtype_name(entry.properties.dtype),
            pieces=[_piece(name, chunk, metadata.storage_data) for chunk in entry.chunks],
        )
    return Manifest(step=step, extra=extra, files=files, tensors=tensors)


def _piece(
    name: str, chunk: ChunkStorageMetadata, storage: dict[MetadataIndex, _StorageInfo]
) -> Piece:
    place = storage[MetadataIndex(name, chunk.offsets)]
    return Piece(
        offsets=list(chunk.offsets),
        sizes=list(chunk.sizes),
        file=place.relative_path,
        start=place.offset,
        bytes=place.length,
    )


def describe_files(partial: Path, rank: int) -> list[FileEntry]:
    """Size and checksum of what this rank wrote, still in its page cache."""
    mine = sorted(partial.glob(f"__{rank}_*.distcp"))
    mine += [partial / ".metadata"] if rank == 0 else []
    return [
        FileEntry(name=path.name, bytes=path.stat().st_size, sha256=digest(path)) for path in mine
    ]


class ManifestReader(dcp.FileSystemReader):
    """Reads the pieces of a checkpoint by its manifest, so that `.metadata` stays pickled."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        super().__init__(path)
        self.manifest = manifest

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return DCP's index, built from the manifest."""
        entries: dict[str, Any] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for name, entry in self.manifest.tensors.items():
            entries[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=getattr(torch, entry.dtype)),
                size=torch.Size(entry.shape),
                chunks=[
                    ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes))
                    for p in entry.pieces
                ],
            )
            for p in entry.pieces:
                storage[MetadataIndex(name, p.offsets)] = _StorageInfo(p.file, p.start, p.bytes)
        return Metadata(state_dict_metadata=entries, storage_data=storage)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as manifests have it: float32."""
    return str(dtype).removeprefix("torch.")


def digest(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
