"""The training run: batch, forward, loss, backward, step, metrics, evaluation, checkpoint."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moetrain import checkpoint, settings
from moetrain.build import build_model, routing_group_tokens
from moetrain.config import Config, TrainConfig
from moetrain.constraints import check_world
from moetrain.data import Prepared, Samples, prepare
from moetrain.engines import Engine
from moetrain.engines.torch import TorchEngine
from moetrain.errors import UserError
from moetrain.evaluate import evaluate, forward, on_device
from moetrain.mesh import Mesh, on_first_local_rank, process_group, rank_and_world, require_same
from moetrain.moe import Draws
from moetrain.moe.keyed import step_key
from moetrain.objective import Counts, Sums, count, count_all, objective, reduce, sums
from moetrain.optim import lr_at
from moetrain.report import Report


@dataclass(frozen=True)
class Run:
    """What stays the same from step to step."""

    config: Config
    folder: Path
    mesh: Mesh
    prepared: Prepared
    engine: Engine
    samples: Samples
    held_out: Samples


@dataclass(frozen=True)
class Position:
    """How far a run has come: with weights and moments, all that changes.

    There is no generator state: every random draw is a function of seed, step and token.
    """

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Sequences trained on, and so the global index of the next."""
    tokens: int = 0
    """Tokens trained on."""


class StepResult(NamedTuple):
    """One optimizer step, before anything is brought together."""

    parts: list[Sums]
    """What each micro-batch of this rank added."""
    counts: Counts
    grad_norm: float
    """Before clipping."""
    lr: float


def run(config: Config) -> int:
    """Train as configured, with every rank that the launcher started; returns exit code 0.

    Raises UserError, alike on every rank, for what the user can mend.
    """
    check_world(config, rank_and_world()[1])
    folder = settings.run_directory(config.out, config.name)
    with process_group() as device:
        mesh = Mesh(device, config.parallel.ep, config.parallel.dp_replicate)
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
    engine = TorchEngine(model, mesh, config.engine.precision, config.seed, config.train)
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
            position = _advance(position, config)
            report.step_took(time.perf_counter() - started)
            if _due(position.step, config.log.every, steps):
                means = reduce(result.parts, result.counts, run.mesh)
                report.train(position.step, position.tokens, means, result.grad_norm, result.lr)
            if _due(position.step, config.eval.every, steps):
                means = evaluate(model, run.held_out, config.eval.sequences, config, run.mesh)
                report.evaluation(position.step, means)
            if _due(position.step, config.checkpoint.every, steps):
                _save(run, position)
                report.saved(position.step)
        report.finish()


def train_step(run: Run, position: Position) -> StepResult:
    """One optimizer step on the next global batch."""
    config, mesh = run.config, run.mesh
    step = position.step + 1
    batches = [
        on_device(run.samples.batch(indices), mesh.device)
        for indices in sample_indices(config, mesh.rank, mesh.world, position.samples)
    ]
    group_size = routing_group_tokens(config)
    counts = count_all([count(batch, group_size) for batch in batches], mesh)
    key = step_key(config.seed, step, mesh.device)
    parts = []
    for number, batch in enumerate(batches, start=1):
        draws = Draws(key, batch.token_id_BL.flatten())
        part = sums(forward(run.engine.model, batch, "train", draws))
        loss = objective(part, counts, config.moe.balance_coef, config.moe.z_loss_coef)
        run.engine.backward(loss, last=number == len(batches))
        parts.append(part.detach())
    lr = _lr(config.train, step)
    return StepResult(parts, counts, run.engine.step(lr), lr)


def sample_indices(config: Config, rank: int, world: int, first: int) -> list[range]:
    """The samples of one rank's micro-batches in the global batch that starts at `first`."""
    micro = config.train.micro_batch
    starts = [first + (j * world + rank) * micro for j in range(config.accumulation(world))]
    return [range(start, start + micro) for start in starts]


def _advance(position: Position, config: Config) -> Position:
    batch = config.train.global_batch
    return Position(
        position.step + 1,
        position.samples + batch,
        position.tokens + batch * config.data.seq_len,
    )


def _due(step: int, every: int, last: int) -> bool:
    """Whether a periodic thing happens after this step: every n-th, and the last; 0 is never."""
    return every > 0 and (step % every == 0 or step == last)


def _lr(train: TrainConfig, step: int) -> float:
    return lr_at(
        step,
        steps=train.steps,
        peak=train.lr,
        min_ratio=train.min_lr_ratio,
        warmup_steps=train.warmup_steps,
        schedule=train.schedule,
        decay_fraction=train.decay_fraction,
    )


# ---------------------------------------------------------------- checkpoints


def _save(run: Run, position: Position) -> None:
    extra = {
        "position": asdict(position),
        "order": _order(run),
        "vocab_size": run.prepared.manifest.vocab_size,
        "tokenizer": run.prepared.manifest.tokenizer,
        "config": run.config.model_dump(mode="json"),
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
