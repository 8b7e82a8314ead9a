"""Saving and loading, by all ranks together: they agree on the outcome, whatever it is."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from moetrain import out_of_memory
from moetrain.checkpoint.checks import check_files, check_pieces, check_tensors
from moetrain.checkpoint.disk import sync, write_synced
from moetrain.checkpoint.folder import FOLDER, beside, delete, remove, saves
from moetrain.checkpoint.manifest import (
    MANIFEST,
    MARKER,
    DamagedCheckpointError,
    Manifest,
    ManifestReader,
    build_manifest,
    describe_files,
    read_manifest,
    save_number,
    seal,
)
from moetrain.errors import RunError, UserError
from moetrain.mesh import gather

Group = dist.ProcessGroup | None
T = TypeVar("T")
GIB = 2**30


class CheckpointError(RunError):
    """Writing or reading failed on some rank (a full disk, say); raised alike on every rank."""


class NoMemoryError(CheckpointError):
    """A rank has no memory for what it would write or read; the checkpoint may be sound."""


def save(
    run_dir: Path,
    step: int,
    tensors: dict[str, Tensor],
    extra: dict[str, Any],
    group: Group = None,
    make: Callable[[str], Tensor] | None = None,
) -> Path:
    """Write and commit checkpoint `step` of a run; every rank of `group` calls it alike.

    `tensors` maps a logical name to a DTensor, or to a tensor that is equal on all ranks; `extra`
    is anything JSON holds. With `make` they are on the meta device, and no DTensors: it is given a
    name when that tensor is written, so that only it and the one before are in memory. Returns the
    checkpoint's directory. A step that is saved again is replaced in one move, and stays complete
    until then.

    Raises CheckpointError on every rank if any rank failed: nothing is committed then, and earlier
    checkpoints are as they were.
    """
    final = Path(run_dir) / FOLDER / f"step-{step:08d}"
    partial = beside(final, "partial")
    rank = dist.get_rank(group)
    try:
        _on_all(group, lambda: _prepare(final) if rank == 0 else None)
        _on_all(group, lambda: _check_shared(partial))
        metadata = _write_tensors(partial, tensors, make, group)
        files = gather(_on_all(group, lambda: describe_files(partial, rank)), group)

        def commit() -> None:
            manifest = build_manifest(step, extra, list(chain(*files)), metadata)
            _commit(partial, final, manifest)

        _on_all(group, lambda: commit() if rank == 0 else None)
    except CheckpointError as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"checkpoint {final} was not saved: {error}") from error
    return final


def _prepare(final: Path) -> None:
    """Make an empty directory for the save, clear what killed ones left."""
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    replaced = beside(final, "replaced")
    if replaced.exists() and not final.exists():
        replaced.rename(final)
    for leftover in [replaced, *folder.glob("step-*.partial")]:
        if leftover.exists():
            remove(leftover)
    beside(final, "partial").mkdir()
    sync(folder.parent)


def _check_shared(partial: Path) -> None:
    # DCP would make a directory of its own on each machine, and nobody would miss the pieces.
    if not partial.is_dir():
        raise UserError(f"{partial}, made by rank 0, is not visible: ranks must share `out`")


class _Writer(dcp.FileSystemWriter):
    """Returns an index that says where each piece lies.

    torch 2.11 writes that to `.metadata`, but leaves it out of what `dcp.save` returns. From 2.12
    on torch's own class will do.
    """

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Complete the index, on the rank that coordinates the save."""
        super().finish(metadata, results)
        written = chain.from_iterable(results)
        metadata.storage_data = {piece.index: piece.storage_data for piece in written}


class _Planner(dcp.DefaultSavePlanner):
    """Asks for the content of a tensor when it is written."""

    def __init__(self, make: Callable[[str], Tensor] | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._make = make

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor of a name; without `make`, this rank's part of it."""
        return super().lookup_object(index) if self._make is None else self._make(index.fqn)


def _write_tensors(
    partial: Path,
    tensors: dict[str, Tensor],
    make: Callable[[str], Tensor] | None,
    group: Group,
) -> Metadata:
    # Nothing is copied ahead: that asks for a CUDA stream, and a thread's device is GPU 0.
    # DCP keeps what it has written until a file is complete: what is made has files of its own.
    writer = _Writer(
        partial,
        sync_files=True,
        overwrite=False,
        per_thread_copy_ahead=0,
        single_file_per_rank=make is None,
    )
    planner = _Planner(make)
    with _dcp_errors("writing tensors", "save"):
        return dcp.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)


def _commit(partial: Path, final: Path, manifest: Manifest) -> None:
    """Seal the finished directory and give it its name."""
    content = manifest.model_dump_json().encode()
    number = max((number for number, _ in saves(final.parent)), default=0) + 1
    write_synced(partial / MANIFEST, content)
    write_synced(partial / MARKER, seal(number, content))
    sync(partial)
    replaced = beside(final, "replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    if replaced.exists():
        delete(replaced)


def load(
    path: Path,
    tensors: dict[str, Tensor],
    group: Group = None,
    prefix: str = "",
    *,
    hash_limit_gib: float = inf,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fill `tensors` in place from a checkpoint directory and return its `extra`.

    Every rank of `group` calls it alike. Tensors keep the layout they have, whatever layout they
    were saved in: DCP reads the pieces each rank lacks. Only names that start with `prefix` are
    looked at: "model." leaves the optimizer's moments on disk.

    All before any tensor is touched: names, shapes and dtypes are compared (UserError listing every
    difference, and the settings of `config`, the reader's own, that may be behind it); then what
    each tensor is made of, and size and SHA-256 of every file, each read by one rank
    (DamagedCheckpointError). A checkpoint above `hash_limit_gib` is not read twice: its files are
    held to their sizes alone, with a warning, and what cannot be read is found once some tensors
    have changed.
    Nothing is unpickled but by torch's weights-only loader.

    Raises NoMemoryError, which says nothing of the checkpoint, where a rank runs out of memory.
    """
    path = Path(path)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    _require_one(gather((path.name, save_number(path)), group))

    def check() -> Manifest:
        manifest = read_manifest(path)
        check_tensors(path, manifest, tensors, prefix, config)
        if rank == 0:
            check_pieces(path, manifest)
        hashed = manifest.total_bytes <= hash_limit_gib * GIB
        check_files(path, manifest.files[rank::world], hashed)
        if not hashed and rank == 0:
            warnings.warn(_not_hashed(path, manifest, hash_limit_gib), stacklevel=3)
        return manifest

    manifest = _on_all(group, check)
    reader = ManifestReader(path, manifest)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _dcp_errors(f"{path} could not be read", "load"):
            dcp.load(dict(tensors), storage_reader=reader, planner=planner, process_group=group)
    except NoMemoryError:
        raise
    except CheckpointError as error:
        raise DamagedCheckpointError(str(error)) from error
    return manifest.extra


def _require_one(seen: list[tuple[str, int]]) -> None:
    """Raise UserError unless all ranks mean the same save: one may be made or deleted meanwhile."""
    if len(set(seen)) > 1:
        names = ", ".join(f"{name} (save {number})" for name, number in dict.fromkeys(seen))
        raise UserError(f"ranks see different checkpoints: {names}; name one step")


def _not_hashed(path: Path, manifest: Manifest, limit: float) -> str:
    return (
        f"{path} ({manifest.total_bytes / GIB:.3g} GiB) is above checkpoint.hash_limit_gib "
        f"({limit:g}): the sizes of its files are right, their content was not checked; "
        f"`moetrain checkpoint verify {path}` does that"
    )


def load_latest(
    run_dir: Path,
    tensors: dict[str, Tensor],
    group: Group = None,
    *,
    hash_limit_gib: float = inf,
    config: Mapping[str, Any] | None = None,
    only: Callable[[dict[str, Any]], bool] = lambda extra: True,
) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest undamaged checkpoint of a run; return its path and `extra`.

    A damaged one is passed over; a warning says which, why, and which was taken instead. `only`
    looks at `extra` and says whether a checkpoint may be taken at all. For the rest see `load`.

    Returns None only where the run never finished a save that may be taken; where all of those are
    damaged, raises UserError rather than let a run start afresh.
    """
    rank = dist.get_rank(group)
    mine = _on_all(group, lambda: saves(Path(run_dir) / FOLDER) if rank == 0 else [])
    found = gather(mine, group)[0]
    # Those without a marker come first, and `saves` has warned of them.
    num_damaged = sum(number == 0 for number, _ in found)
    num_others = 0
    for _, path in reversed(found[num_damaged:]):
        try:
            if not only(_on_all(group, lambda path=path: read_manifest(path)).extra):
                num_others += 1
                continue
            extra = load(path, tensors, group, hash_limit_gib=hash_limit_gib, config=config)
        except DamagedCheckpointError as error:
            num_damaged += 1
            if rank == 0:
                warnings.warn(f"{path.name} is passed over: {error}", stacklevel=2)
        else:
            if num_damaged and rank == 0:
                warnings.warn(f"{path.name} is taken, the newest that is whole", stacklevel=2)
            return path, extra
    if num_damaged and not num_others:
        raise UserError(f"all checkpoints of {run_dir} are damaged ({num_damaged}, see warnings)")
    return None


def _on_all(group: Group, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result, or raise the same error on every rank.

    A user's error keeps its kind and text; any other becomes a CheckpointError naming its rank.
    """
    result, error, cause = None, None, None
    try:
        result = action()
    except UserError as failure:
        error = cause = failure
    except Exception as failure:
        error, cause = CheckpointError(_blame(dist.get_rank(group), failure)), failure
    errors = [error for error in gather(error, group) if error is not None]
    if errors:
        # dict.fromkeys: what every rank says is said once.
        raise type(errors[0])("\n".join(dict.fromkeys(map(str, errors)))) from cause
    return cast(T, result)


@contextmanager
def _dcp_errors(what: str, function: str) -> Iterator[None]:
    """Turn the exception of DCP's `function`, which it raises alike on every rank, into
    CheckpointError."""
    try:
        yield
    except CheckpointException as error:
        for rank, (failure, _) in error.failures.items():
            if text := out_of_memory.explain(failure, place=(__name__, function)):
                raise NoMemoryError(f"rank {rank}: {text}") from error
        blames = (_blame(rank, failure) for rank, (failure, _) in error.failures.items())
        raise CheckpointError(f"{what}: " + "\n".join(blames)) from error


def _blame(rank: int, error: BaseException) -> str:
    # What torch says where a disk takes a part of what it writes.
    hint = " (is the disk full?)" if "unexpected pos" in str(error) else ""
    return f"rank {rank}: {type(error).__name__}: {error}{hint}"
