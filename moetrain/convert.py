"""What `moetrain checkpoint convert` does: write a checkpoint in one piece, in some format."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save as serialize
from torch import Tensor

from moetrain import checkpoint
from moetrain.checkpoint.checks import is_model
from moetrain.checkpoint.disk import sync
from moetrain.checkpoint.manifest import Manifest
from moetrain.checkpoint.reading import dtype_of, open_checkpoint, read_tensor
from moetrain.errors import UserError
from moetrain.hf.names import KEPT
from moetrain.restore import TOKENIZER_FILE

Format = Literal["moetrain", "safetensors", "torch"]
SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in one safetensors file (but for a tensor that is larger)."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Source(NamedTuple):
    """What is to be written, and where it is read from."""

    path: Path
    manifest: Manifest
    weights_only: bool
    bf16: bool

    @property
    def names(self) -> list[str]:
        """Of the tensors that are wanted."""
        return [name for name in self.manifest.tensors if is_model(name) or not self.weights_only]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is to have."""
        saved = dtype_of(self.manifest.tensors[name])
        is_rounded = self.bf16 and is_model(name) and saved.is_floating_point
        return torch.bfloat16 if is_rounded else saved

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors in full logical shape, on the CPU."""
        entries = {name: self.manifest.tensors[name] for name in names}
        return {n: read_tensor(self.path, entry).to(self.dtype(n)) for n, entry in entries.items()}

    def num_bytes(self, name: str) -> int:
        """Of a tensor as it is to be."""
        return math.prod(self.manifest.tensors[name].shape) * self.dtype(name).itemsize


def convert(
    path: Path, out: Path, target: Format, weights_only: bool = False, bf16: bool = False
) -> None:
    """Write the checkpoint that `path` names to `out`, which must not exist; verified first.

    Tensors keep their names and are whole. `weights_only` leaves out the optimizer's, `bf16` rounds
    what is of the model. `moetrain`: a folder as of a run, whose only checkpoint it is.
    `safetensors`: a folder of files, with an index where there are several. `torch`: a file for
    `torch.load(weights_only=True)`. Raises UserError where `out` is in the way or cannot be
    written; it is then not there.
    """
    if bf16 and target == "moetrain":
        raise UserError(
            "--dtype bf16 is for --format safetensors and torch; a checkpoint to continue from "
            "keeps its precision"
        )
    found = checkpoint.resolve(path)
    # Copies get checksums of their own, which would cover up any damage.
    source = Source(found, open_checkpoint(found, hashed=True), weights_only, bf16)
    with written_beside(out) as place:
        if target == "moetrain":
            _write_checkpoint(place, source)
        elif target == "safetensors":
            manifest = source.manifest
            config = json.dumps(manifest.extra.get("config"))
            header = {"format": "pt", "step": str(manifest.step), "config": config}
            sizes = {name: source.num_bytes(name) for name in source.names}
            write_safetensors(place, sizes, source.read, header, SHARD_BYTES)
        else:
            _write_torch(place, source)


@contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """A path to write to; what is there takes the name `out` once it is complete."""
    if os.path.lexists(out):
        raise UserError(f"OUT ({out}) exists; name a place that does not")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
            place = Path(beside) / out.name
            yield place
            for written in (*place.rglob("*"), place):
                sync(written)
            place.rename(out)
        sync(out.parent)
    except (OSError, RuntimeError) as error:
        # torch tells of a full disk by an error of its own, which comes from the disk's.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"OUT ({out}) was not written: {reason}") from error


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone, whatever launcher started it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _write_checkpoint(place: Path, source: Source) -> None:
    with one_process():
        manifest = source.manifest
        checkpoint.save(place, manifest.step, source.read(source.names), manifest.extra)
    for file in (TOKENIZER_FILE, *KEPT):
        if (origin := source.path.parent.parent / file).exists():
            shutil.copyfile(origin, place / file)


def _write_torch(place: Path, source: Source) -> None:
    tensors, manifest = source.read(source.names), source.manifest
    content = {"step": manifest.step, "extra": manifest.extra, "tensors": tensors}
    with place.open("wb") as file:
        torch.save(content, file)


def write_safetensors(
    place: Path,
    sizes: Mapping[str, int],
    read: Callable[[list[str]], dict[str, Tensor]],
    header: dict[str, str],
    shard_bytes: int,
) -> None:
    """Write a folder of safetensors files with at most `shard_bytes` each, and their index.

    `sizes` are bytes by name, `read` gives some of the tensors, and `header` stands in each file.
    Files and index are named as the `transformers` library does. One file at a time is in memory,
    twice.
    """
    place.mkdir()
    groups = shards(sizes, shard_bytes)
    files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        files = [WEIGHTS]
    else:
        places = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (place / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    for file, group in zip(files, groups, strict=True):
        (place / file).write_bytes(serialize(read(group), metadata=header))


def shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, in groups of at most `limit` bytes, or of one name; at least one."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups
