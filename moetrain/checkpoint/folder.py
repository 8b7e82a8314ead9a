"""The checkpoints of a run: which there are, which one is meant, which ones go."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path

import torch.distributed as dist

from moetrain.checkpoint.manifest import MANIFEST, MARKER, save_number
from moetrain.errors import UserError

FOLDER = "checkpoints"
_STEP = re.compile(r"step-(\d{8,})(\.replaced)?")


def committed(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest save first.

    The order is that in which they were saved, not that of their steps: a run that went back to an
    earlier step continues from what it saved since, not from the future it left.
    """
    return [path for number, path in saves(Path(run_dir) / FOLDER) if number]


def latest(run_dir: Path) -> Path | None:
    """Return the checkpoint saved last, or None where the run has none."""
    return (committed(run_dir) or [None])[-1]


def resolve(path: Path | str) -> Path:
    """Return the checkpoint meant by a run directory, its checkpoints directory or a checkpoint.

    A directory stands for the checkpoint saved last. Raises UserError where there is none, or where
    the checkpoint named is missing or incomplete; the message lists the steps there are.
    """
    path = Path(path)
    if save_number(path):
        return path
    folder = folder_of(path)
    found = committed(folder.parent)
    if found and folder != path.parent:
        return found[-1]
    problem = "holds no complete checkpoint" if path.exists() else "does not exist"
    names = ", ".join(checkpoint.name for checkpoint in found) or "none"
    raise UserError(f"{path} {problem}; complete checkpoints in {folder}: {names}")


def every(path: Path | str) -> list[Path]:
    """Return the checkpoint that a path names, or all of the run it names, oldest save first.

    Damaged ones too, first those that have lost their commit marker; what is no checkpoint (yet, or
    any more) is left out. Raises UserError where there is none.
    """
    path = Path(path)
    if path.is_dir() and (_STEP.fullmatch(path.name) or (path / MANIFEST).exists()):
        return [path]
    folder = folder_of(path)
    found = [path for _, path in _by_step(folder)]
    return found if found and folder != path.parent else [resolve(path)]


def folder_of(path: Path) -> Path:
    """Return the folder of checkpoints that a run, the folder itself, or a checkpoint stands for.

    Raises UserError where there is none.
    """
    if path.name in ("", ".."):  # what "." stands for has a name, which is looked at
        path = path.resolve()
    candidates = (path / FOLDER, path, path.parent)
    folder = next((c for c in candidates if c.name == FOLDER and c.is_dir()), None)
    if folder is None:
        raise UserError(
            f"{path} is no run with checkpoints, nor a checkpoint (a run saves some only where "
            "checkpoint.every is above 0)"
        )
    return folder


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the `keep` (at least 1) checkpoints saved last; rank 0 does it.

    A checkpoint that cannot be deleted is a warning, never an error.
    """
    assert keep >= 1, "the last checkpoint is never deleted"
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    try:
        found = committed(run_dir)
    except OSError as error:
        warnings.warn(f"{run_dir} could not be pruned: {error}", stacklevel=2)
        return
    for path in found[:-keep]:
        delete(path)


def saves(folder: Path) -> list[tuple[int, Path]]:
    """Return (number of the save, path) of one directory per step, oldest save first.

    Number 0: the directory has lost its commit marker, for which there is a warning.
    """
    found = _by_step(folder)
    for number, path in found:
        if number == 0:
            warnings.warn(f"{path} is ignored: no valid {MARKER} file", stacklevel=2)
    return found


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    by_step: dict[str, tuple[int, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if name := _STEP.fullmatch(path.name):
            # max: of step-N and step-N.replaced the newer one counts.
            by_step[name[1]] = max(by_step.get(name[1], (0, path)), (save_number(path), path))
    return sorted(by_step.values())


def beside(path: Path, state: str) -> Path:
    """Return the name of a directory that is not (or no longer) the checkpoint of its step."""
    return path.with_name(f"{path.name}.{state}")


def delete(path: Path) -> None:
    """Delete a checkpoint; a failure is a warning."""
    # Renamed first: a kill half-way must not leave a gutted checkpoint under a good name.
    doomed = beside(path, "partial")
    try:
        path.rename(doomed)
    except OSError as error:
        warnings.warn(f"{path} could not be deleted: {error}", stacklevel=2)
    else:
        remove(doomed)


def remove(leftover: Path) -> None:
    """Delete a directory that is no checkpoint; a failure is a warning."""
    try:
        shutil.rmtree(leftover)
    except OSError as error:
        warnings.warn(f"{leftover} could not be deleted: {error}", stacklevel=2)
