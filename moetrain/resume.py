"""Where a run begins: what `checkpoint.resume` means, at the first start and at later ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moetrain import checkpoint, settings
from moetrain.checkpoint.checks import changed_settings, is_model
from moetrain.config import Config
from moetrain.errors import UserError
from moetrain.failure import RESTARTS
from moetrain.mesh import gather
from moetrain.step import Position, Run

RESTART_COUNTS = (RESTARTS, "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""Where launchers and Slurm say how often they have started this again."""


def is_restart(environment: Mapping[str, str]) -> bool:
    """Whether this process was started again, by itself, to go on with what was begun."""
    return any(int(environment.get(name) or 0) > 0 for name in RESTART_COUNTS)


def started_again() -> bool:
    """Whether that is so on any rank, alike on all of them. Collective."""
    # Of the agents of several nodes, only the one whose rank failed has counted a restart.
    return any(gather(is_restart(os.environ)))


def began_with(resume: str, extra: Mapping[str, Any]) -> bool:
    """Whether a checkpoint, by its `extra`, is of a run that was started with this `resume`."""
    return extra["config"]["checkpoint"]["resume"] == resume


def begin(run: Run) -> Position:
    """Load what `checkpoint.resume` names into the engine, and say where the run stands."""
    found = load_start(run.config, run.folder, run.engine.state(), started_again())
    if found is None:
        if run.config.init_from is not None:
            _load_weights(run, run.config.init_from)
        return Position()
    path, extra = found
    text = run.prepared.manifest.fingerprint
    _check_same_order(path, extra["order"], _order(run.config, text))
    return Position.of(extra["position"])


def _load_weights(run: Run, start: Path) -> None:
    """Load those of another run's checkpoint into the engine; a collective.

    Raises UserError, alike on every rank, where they are of another model or tokenizer.
    """
    config = run.config
    weights = {name: tensor for name, tensor in run.engine.state().items() if is_model(name)}
    limit, own = config.checkpoint.hash_limit_gib, settings.redacted(config)
    try:
        extra = checkpoint.load(start, weights, prefix="model.", hash_limit_gib=limit, config=own)
    except UserError as error:
        raise UserError(f"init_from ({start}): {error}") from None
    if extra["tokenizer"] != run.prepared.manifest.tokenizer:
        raise UserError(
            f"data.tokenizer ({config.data.tokenizer}) is not the one that init_from ({start}) was "
            "trained with; leave it out to have that one"
        )


def beside_tensors(run: Run, position: Position) -> dict[str, Any]:
    """What a checkpoint of a run holds beside tensors."""
    text = run.prepared.manifest
    return described(run.config, position, text.vocab_size, text.tokenizer, text.fingerprint)


def described(
    config: Config, position: Position, vocab_size: int, tokenizer: str, text: str | None
) -> dict[str, Any]:
    """What a checkpoint holds beside tensors; `tokenizer` and `text` are fingerprints, the latter
    None where it is not known."""
    return {
        "position": asdict(position),
        "order": _order(config, text),
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "config": settings.redacted(config),
    }


def load_start(
    config: Config, folder: Path, state: dict[str, Tensor], restarted: bool
) -> tuple[Path, dict[str, Any]] | None:
    """Load what a run begins with into `state`; return its path and `extra`. Collective.

    None where it begins at the start. A run that was started again continues from what it has
    saved, also where `checkpoint.resume` told its first start to begin elsewhere.

    Raises UserError where that is damaged, of another model or not there, or would be overwritten.
    """
    resume, found = config.checkpoint.resume, None
    own, limit = settings.redacted(config), config.checkpoint.hash_limit_gib
    options: dict[str, Any] = {"hash_limit_gib": limit, "config": own}
    if resume == "auto":
        found = checkpoint.load_latest(folder, state, **options)
    elif restarted:
        saved_since = partial(began_with, own["checkpoint"]["resume"])  # as it was written down
        found = checkpoint.load_latest(folder, state, **options, only=saved_since)
    if found is None and resume == "never":
        _require_none(folder)
    elif found is None and resume != "auto":
        path = _named(resume)
        found = path, checkpoint.load(path, state, **options)
    if found is not None and dist.get_rank() == 0:
        _warn_of_changes(*found, own)
    return found


def _require_none(folder: Path) -> None:
    if found := checkpoint.latest(folder):
        raise UserError(
            f"checkpoint.resume (never) would write over the run in {folder}, which holds "
            f"{found.name}; choose another name, remove the folder, or set it to auto"
        )


def _named(resume: str) -> Path:
    try:
        return checkpoint.resolve(resume)
    except UserError as error:
        raise UserError(
            f"checkpoint.resume ({resume}) is not auto, never or a path: {error}"
        ) from None


def _warn_of_changes(path: Path, extra: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """The shapes fit, but the model that continues may compute something else."""
    if changed := changed_settings(extra["config"], own, ("model.", "moe.")):
        warnings.warn(f"{path.name} continues with {', '.join(changed)}", stacklevel=2)


def _order(config: Config, text: str | None) -> dict[str, Any]:
    """What the order of samples depends on."""
    data = config.data
    order = {"data.seq_len": data.seq_len, "data.packing": data.packing}
    return {"seed": config.seed, **order, "data": text}


def _check_same_order(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to continue on another order of samples: it would repeat some and lose others."""
    saved = {"data.packing": "cut", **saved}  # an older version knew no other
    changed = [
        f"{key} ({wanted[key]}) was {saved[key]}" for key in wanted if wanted[key] != saved[key]
    ]
    if changed:
        raise UserError(
            f"cannot continue from {path}: {', '.join(changed)}; set it back, or start a run of "
            "another name"
        )
