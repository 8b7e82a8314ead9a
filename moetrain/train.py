"""The training run: steps, metrics, evaluation, checkpoints; where it starts and how it ends."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moetrain import checkpoint, engines, lock, settings
from moetrain.build import build_model
from moetrain.config import Config, TrainConfig
from moetrain.constraints import check_world
from moetrain.data import Samples, prepare
from moetrain.errors import DivergedError, UserError
from moetrain.evaluate import evaluate
from moetrain.mesh import (
    Mesh,
    on_first_local_rank,
    process_group,
    rank_and_world,
    require_same,
)
from moetrain.objective import reduce
from moetrain.report import Report
from moetrain.step import Position, Run, train_step


def run(config: Config) -> int:
    """Train as configured, with every rank that the launcher started; returns exit code 0.

    Raises UserError, alike on every rank, for what the user can mend.
    """
    world = rank_and_world()[1]
    check_world(config, world, settings.ranks_of_node())
    engines.check(config, world)
    folder = settings.run_directory(config.out, config.name)
    with process_group() as device, lock.hold(folder):
        parallel = config.parallel
        mesh = Mesh(device, parallel.ep, parallel.dp_replicate, parallel.nodes_apart)
        train(set_up(config, folder, mesh))
    return 0


def set_up(config: Config, folder: Path, mesh: Mesh) -> Run:
    """Prepare the data and build the sharded model; a collective."""
    prepared = on_first_local_rank(lambda: prepare(config.data))
    require_same(
        f"the text of data.source ({config.data.source})",
        prepared.manifest.fingerprint,
        "give every node the same files (and for stdlib the same Python)",
    )
    model = build_model(config, prepared.manifest.vocab_size)
    engine = engines.build(config, model, mesh)
    samples, held_out = (
        Samples(prepared, split, config.data.seq_len, config.seed, config.data.mask_documents)
        for split in ("train", "eval")
    )
    return Run(config, folder, mesh, prepared, engine, samples, held_out)


def train(run: Run) -> None:
    """Train from the newest checkpoint, or from the start, to the last step."""
    config, steps = run.config, run.config.train.steps
    position = _resume(run)
    model, start = run.engine.model, position.step
    with Report(config, run.folder, run.mesh, run.prepared, model, start) as report:
        while position.step < steps:
            started = time.perf_counter()
            result = train_step(run, position)
            position = _advance(position, config, result.is_bad)
            report.step_took(time.perf_counter() - started)
            if result.is_bad:
                report.skipped(position.step, result.grad_norm)
            is_stuck = position.bad_in_a_row >= config.train.max_bad_steps
            if is_stuck or _due(position.step, config.log.every, steps):
                means = reduce(result.parts, result.counts, run.mesh, result.batch_balance)
                report.train(
                    position.step,
                    position.tokens,
                    position.bad_steps,
                    means,
                    result.grad_norm,
                    result.lr,
                )
            if is_stuck:
                raise DivergedError(_diverged(position, config.train))
            if _due(position.step, config.eval.every, steps):
                means = evaluate(model, run.held_out, config.eval.sequences, config, run.mesh)
                report.evaluation(position.step, means)
            if _due(position.step, config.checkpoint.every, steps):
                _save(run, position)
                report.saved(position.step)
        report.finish()


def _advance(position: Position, config: Config, is_bad: bool) -> Position:
    batch = config.train.global_batch
    return Position(
        position.step + 1,
        position.samples + batch,
        position.tokens + batch * config.data.seq_len,
        position.bad_steps + is_bad,
        position.bad_in_a_row + 1 if is_bad else 0,
    )


def _diverged(position: Position, train: TrainConfig) -> str:
    return (
        f"loss or gradient was not finite in {position.bad_in_a_row} "
        f"step{'s' * (position.bad_in_a_row > 1)} in a row, up to step {position.step} "
        f"(train.max_bad_steps {train.max_bad_steps}); try a train.lr below {train.lr:g} or more "
        "train.warmup_steps, from an earlier checkpoint (checkpoint.resume PATH) or from the start "
        "(another name)"
    )


def _due(step: int, every: int, last: int) -> bool:
    """Whether a periodic thing happens after this step: every n-th, and the last; 0 is never."""
    return every > 0 and (step % every == 0 or step == last)


# ---------------------------------------------------------------- checkpoints


def _save(run: Run, position: Position) -> None:
    extra = {
        "position": asdict(position),
        "order": _order(run),
        "vocab_size": run.prepared.manifest.vocab_size,
        "tokenizer": run.prepared.manifest.tokenizer,
        "config": settings.redacted(run.config),
    }
    checkpoint.save(run.folder, position.step, run.engine.state(), extra)
    checkpoint.prune(run.folder, run.config.checkpoint.keep)


def _resume(run: Run) -> Position:
    """Load what `checkpoint.resume` names into the engine, and say where the run stands."""
    resume, state = run.config.checkpoint.resume, run.engine.state()
    if resume == "never":
        if found := checkpoint.latest(run.folder):
            raise UserError(
                f"checkpoint.resume (never) would write over the run in {run.folder}, which holds "
                f"{found.name}; choose another name, remove the folder, or set it to auto"
            )
        return Position()
    if resume == "auto":
        loaded = checkpoint.load_latest(run.folder, state)
        if loaded is None:
            return Position()
        path, extra = loaded
    else:
        path = _named_checkpoint(resume)
        extra = checkpoint.load(path, state)
    _check_same_order(path, extra["order"], _order(run))
    return Position(**extra["position"])


def _named_checkpoint(resume: str) -> Path:
    try:
        return checkpoint.resolve(resume)
    except UserError as error:
        raise UserError(
            f"checkpoint.resume ({resume}) is not auto, never or a path: {error}"
        ) from None


def _order(run: Run) -> dict[str, Any]:
    """What the order of samples depends on."""
    data = run.config.data
    return {
        "seed": run.config.seed,
        "data.seq_len": data.seq_len,
        "data": run.prepared.manifest.fingerprint,
    }


def _check_same_order(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to continue on another order of samples: it would repeat some and lose others."""
    changed = [
        f"{key} ({wanted[key]}) was {saved[key]}" for key in wanted if wanted[key] != saved[key]
    ]
    if changed:
        raise UserError(
            f"cannot continue from {path}: {', '.join(changed)}; set it back, or start a run of "
            "another name"
        )
