"""The routing trace of a run: what every token of a step chose, and would have chosen next.

RUN/trace/step-00000010/rank-00000.npz holds what rank 0 saw of step 10: a header in JSON, and
arrays. Every file is complete or absent, and says under which settings it was written, so a run may
be killed at any time and resumed on other ranks. `moetrain.replay` answers questions of it.

Shape suffixes: N MoE layers, S sequences, L tokens of one, T = S·L tokens, K choices, X experts of
a token's ranking.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from moetrain import settings
from moetrain.config import Config, MoEConfig
from moetrain.errors import UserError
from moetrain.moe import Preferences
from moetrain.precision import spelled_out

TRACE_FOLDER = "trace"
FORMAT = 1
"""To be raised when what is written changes."""
FEWEST_RANKED = 4
HEADER = {"world", "step", "config", "capacity_factors", "top_k"}
"""What a file says of itself, beside its format."""
DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)
"""What numpy and json raise for a file that is not what it should be."""

_log = logging.getLogger(__name__)


def num_ranked(moe: MoEConfig) -> int:
    """Experts to note of every token: as many as it chooses and could spill to."""
    return max(FEWEST_RANKED, moe.top_k * (1 + moe.spill_depth))


class Record(NamedTuple):
    """One step of all ranks, its tokens in the order of their samples."""

    step: int
    config: Config
    """Of the run, as it then was."""
    world: int
    capacity_factors: list[float | None]
    """Of each MoE layer; None is dropless."""
    sample_S: Tensor
    """int64: global sample indices, ascending."""
    layers: list[Preferences]

    @property
    def token_id_T(self) -> Tensor:
        """int64: global token ids, which key random draws."""
        length = self.config.data.seq_len
        return (self.sample_S[:, None] * length + torch.arange(length)).flatten()


# ---------------------------------------------------------------- writing


@final
class TraceLog:
    """Writes what one rank saw, a file a step. Where there is no room, the step is left out, with a
    warning."""

    def __init__(self, run_dir: Path, config: Config, rank: int, world: int) -> None:
        self._folder, self._rank, self._had_room = run_dir / TRACE_FOLDER, rank, True
        self._header = {
            "format": FORMAT,
            "rank": rank,
            "world": world,
            "config": settings.redacted(spelled_out(config)),
        }

    def write(
        self,
        step: int,
        samples: Sequence[int],
        parts: Sequence[Sequence[Preferences]],
        capacity_factors: Sequence[float | None],
    ) -> None:
        """Write a step: its global sample indices, the preferences of every layer in each
        micro-batch (the outer sequence), and the capacity factors of the layers."""
        header = {**self._header, "step": step, "capacity_factors": list(capacity_factors)}
        content = _packed(header, samples, parts)
        path = self._folder / _step_name(step) / _rank_name(self._rank)
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(path)
            self._had_room = True
        except OSError as error:
            if self._had_room:
                _log.warning("%s leaves out step %d: %s", self._folder, step, error.strerror)
            self._had_room = False
            with suppress(OSError):
                partial.unlink()


def drop_later_steps(run_dir: Path, step: int) -> None:
    """Drop what a run that continues after `step` will write again; 0 keeps all of an earlier run
    of the name as trace.old."""
    folder = run_dir / TRACE_FOLDER
    if not folder.exists():
        return
    if step == 0:
        old = folder.with_name(f"{TRACE_FOLDER}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.replace(old)
        return
    for number, path in _step_folders(folder):
        if number > step:
            shutil.rmtree(path)


def _packed(
    header: dict[str, Any], samples: Sequence[int], parts: Sequence[Sequence[Preferences]]
) -> bytes:
    """The content of a file."""
    layers = [
        Preferences(*map(torch.cat, zip(*of_layer, strict=True)))
        for of_layer in zip(*parts, strict=True)
    ]
    expert_NTX, weight_NTX, sampled_NTK, valid_NT = (
        torch.stack(column).cpu() for column in zip(*layers, strict=True)
    )
    if weight_NTX.dtype == torch.bfloat16:  # which numpy lacks
        weight_NTX = weight_NTX.view(torch.int16)
    header = {**header, "top_k": sampled_NTK.shape[2]}
    content = io.BytesIO()
    np.savez_compressed(
        content,
        header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
        sample=np.asarray(samples, dtype=np.int64),
        expert=expert_NTX.numpy(),
        weight=weight_NTX.numpy(),
        sampled=np.packbits(sampled_NTK.numpy()),
        valid=np.packbits(valid_NT.numpy()),
    )
    return content.getvalue()


# ---------------------------------------------------------------- reading


@final
class Trace:
    """The complete steps of a trace, read one at a time."""

    def __init__(self, folder: Path, steps: list[int]) -> None:
        self.folder, self.steps = folder, steps
        last = self.record(steps[-1])
        self.settings, self.world, self.num_layers = last.config, last.world, len(last.layers)

    @classmethod
    def open(cls, path: Path | str) -> Trace:
        """Open the trace of a run's folder, or a trace's own folder.

        Steps of which a rank wrote nothing, or a file is damaged, are left out with a warning.
        Raises UserError where no step is left.
        """
        folder = Path(path)
        if (folder / TRACE_FOLDER).is_dir():
            folder /= TRACE_FOLDER
        found = _step_folders(folder) if folder.is_dir() else []
        if not found:
            raise UserError(
                f"{path} holds no routing trace; name the folder of a run that was trained with "
                "log.trace true"
            )
        steps = [step for step, place in found if _is_complete(place)]  # as far as headers tell
        if not steps:
            raise UserError(f"{folder} holds no complete step; train on, or record again")
        return cls(folder, steps)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.folder.parent

    @property
    def num_bytes(self) -> int:
        """Size of the complete steps' files."""
        places = [self.folder / _step_name(step) for step in self.steps]
        return sum(path.stat().st_size for place in places for path in place.glob("rank-*.npz"))

    def record(self, step: int) -> Record:
        """One of `steps`. Raises UserError where a file has become damaged."""
        return _join([_read(path) for path in _rank_files(self.folder / _step_name(step))])

    def records(self) -> Iterator[Record]:
        """All steps, in order."""
        return map(self.record, self.steps)


class _Part(NamedTuple):
    """One file."""

    header: dict[str, Any]
    sample_S: Tensor
    layers: list[Preferences]


def _is_complete(place: Path) -> bool:
    """Whether every rank's file is there and was finished; a warning says what is wrong."""
    try:
        for path in _rank_files(place):
            _read_header(path)
    except UserError as error:
        warnings.warn(f"{error}; {place.name} is left out", stacklevel=2)
        return False
    return True


def _join(parts: list[_Part]) -> Record:
    """Bring the ranks of a step together, its tokens in the order of their samples."""
    header = parts[0].header
    config = _config(json.dumps(header["config"]))
    sample_S, order_S = torch.cat([part.sample_S for part in parts]).sort()

    def in_order(pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(pieces)).unflatten(0, (len(order_S), -1))[order_S].flatten(0, 1)

    layers = [
        Preferences(*map(in_order, zip(*of_layer, strict=True)))
        for of_layer in zip(*(part.layers for part in parts), strict=True)
    ]
    factors = header["capacity_factors"]
    return Record(header["step"], config, header["world"], factors, sample_S, layers)


def _rank_files(place: Path) -> list[Path]:
    """The files of every rank of a step; UserError where one is missing."""
    files = sorted(place.glob("rank-*.npz"))
    world = _read_header(files[0])["world"] if files else 1
    if [path.name for path in files] != [_rank_name(rank) for rank in range(world)]:
        raise UserError(f"{place} lacks the files of some ranks: it has {len(files)} of {world}")
    return files


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The arrays of a file; UserError where it is damaged or of another format."""
    try:
        # numpy leaves a file open that is no archive
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            yield arrays
    except DAMAGE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: {error}") from error


def _read_header(path: Path) -> dict[str, Any]:
    with _opened(path) as arrays:
        header = json.loads(arrays["header"].tobytes())
        if header["format"] != FORMAT:
            raise UserError(
                f"{path} has format {header['format']}, not {FORMAT}; record the trace again, or "
                "read it with the moetrain that wrote it"
            )
        if missing := HEADER - header.keys():
            raise ValueError(f"its header lacks {', '.join(sorted(missing))}")
        return header


def _read(path: Path) -> _Part:
    header = _read_header(path)
    with _opened(path) as arrays:
        sample_S, expert_NTX, weight_NTX = (
            torch.from_numpy(arrays[name]) for name in ("sample", "expert", "weight")
        )
        num_layers, tokens, _ = expert_NTX.shape
        sampled_NTK = _unpacked(arrays["sampled"], (num_layers, tokens, header["top_k"]))
        valid_NT = _unpacked(arrays["valid"], (num_layers, tokens))
        if weight_NTX.shape != expert_NTX.shape or tokens % len(sample_S):
            raise ValueError("its arrays do not fit together")
        if expert_NTX.max() > header["config"]["moe"]["experts"] or expert_NTX.min() < 0:
            raise ValueError("it names experts that there are not")
    if weight_NTX.dtype == torch.int16:
        weight_NTX = weight_NTX.view(torch.bfloat16)
    of_layers = zip(expert_NTX, weight_NTX, sampled_NTK, valid_NT, strict=True)
    return _Part(header, sample_S, [Preferences(*layer) for layer in of_layers])


def _unpacked(bits: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits, count=math.prod(shape)).astype(bool).reshape(shape))


@cache
def _config(text: str) -> Config:
    return settings.resolve(None, json.loads(text))


# ---------------------------------------------------------------- names


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _rank_name(rank: int) -> str:
    return f"rank-{rank:05d}.npz"


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Steps that something was written of, in order, and where."""
    named = [(re.fullmatch(r"step-(\d{8,})", path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in named if match)
