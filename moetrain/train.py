"""The training run: steps, metrics, evaluation, checkpoints; where it starts and how it ends."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d

from moetrain import checkpoint, engines, lock, settings
from moetrain.autopilot import changes
from moetrain.build import build_model
from moetrain.checkpoint import CheckpointError, Saver
from moetrain.config import Config, TrainConfig
from moetrain.constraints import check_world
from moetrain.data import prepare
from moetrain.errors import DivergedError
from moetrain.evaluate import evaluate, open_samples
from moetrain.failure import end_with_launcher
from moetrain.mesh import (
    Mesh,
    limit_collectives,
    on_first_local_rank,
    process_group,
    rank_and_world,
    require_same,
)
from moetrain.objective import reduce
from moetrain.precision import computes_in
from moetrain.report import Report
from moetrain.resume import begin, beside_tensors, is_restart
from moetrain.spikes import describe
from moetrain.step import Position, Run, StepResult, train_step
from moetrain.stopping import StopSignals
from moetrain.trace import num_ranked
from moetrain.watchdog import UNWATCHED, Watch, Watchdog

LINGERING_S = 90.0
"""How long ranks of before a restart may take to end and leave the run's folder."""


def run(config: Config) -> int:
    """Train as configured, with every rank that the launcher started.

    Returns exit code 0, or 75 where a signal stopped the run and it has been saved (without
    checkpoints: 128 and the signal's number). Raises UserError, alike on every rank, for what the
    user can mend.
    """
    end_with_launcher()
    world = rank_and_world()[1]
    check_world(config, world, settings.ranks_of_node())
    engines.check(config, world)
    folder = settings.run_directory(config.out, config.name)
    limit_s = config.parallel.timeout_s
    restarted = is_restart(os.environ)
    with (
        StopSignals(saves=config.checkpoint.every > 0) as signals,
        process_group() as device,
        lock.hold(folder, LINGERING_S if restarted else 0.0),
        _watched(folder, limit_s) as watch,
    ):
        parallel = config.parallel
        mesh = Mesh(device, parallel.ep, parallel.dp_replicate, parallel.nodes_apart)
        ready = set_up(config, folder, mesh)
        position = begin(ready)
        # The watchdog is to speak first: it knows more than a collective that gives up.
        limit_collectives(limit_s + 60)
        signals.defer()
        if go_on(ready, position, lambda: signals.asked, watch):
            return 0
        mesh.any(False)  # together: a launcher ends the others once one has stopped
        signals.done()
    return signals.code()


def _watched(folder: Path, limit_s: float) -> AbstractContextManager[Watch]:
    """A watchdog, where there are several ranks to hang; collective."""
    if dist.get_world_size() == 1:
        return nullcontext(UNWATCHED)
    return Watchdog(distributed_c10d._get_default_store(), folder, limit_s)


def set_up(config: Config, folder: Path, mesh: Mesh) -> Run:
    """Prepare the data and build the sharded model; a collective."""
    prepared = on_first_local_rank(lambda: prepare(config.data))
    require_same(
        f"the text of data.source ({config.data.source})",
        prepared.manifest.fingerprint,
        "give every node the same files (and for stdlib the same Python)",
    )
    require_same(
        f"engine.precision ({config.engine.precision}, here {computes_in(config.engine)})",
        computes_in(config.engine),
        "set it to fp32, which all machines have instructions for",
    )
    model = build_model(config, prepared.manifest.vocab_size)
    engine = engines.build(config, model, mesh)
    samples, held_out = (open_samples(prepared, split, config) for split in ("train", "eval"))
    shortened = samples.num_shortened + held_out.num_shortened
    if shortened and mesh.rank == 0:
        documents = prepared.manifest.train.documents + prepared.manifest.eval.documents
        warnings.warn(
            f"data.seq_len ({config.data.seq_len}) leaves out the end of {shortened:,} of "
            f"{documents:,} documents, which are longer; raise it to keep them whole",
            stacklevel=2,
        )
    return Run(config, folder, mesh, prepared, engine, samples, held_out)


def train(run: Run) -> None:
    """Train from where the run begins to the last step; a collective."""
    go_on(run, begin(run), lambda: False, UNWATCHED)


def go_on(run: Run, position: Position, is_asked: Callable[[], bool], watch: Watch) -> bool:
    """Train from a position to the last step.

    `is_asked` tells whether this rank was asked to stop. Returns whether the run came to its end;
    otherwise some rank was asked, and all stopped after the same step and saved.
    """
    config, steps = run.config, run.config.train.steps
    saver = Saver(run.folder, config.checkpoint.keep, config.checkpoint.asynchronous)
    model = run.engine.model
    with Report(config, run.folder, run.mesh, run.prepared, model, position) as report:
        stop = False
        while not stop and (position.step < steps or position.owes_evaluation):
            _report_saves(saver, report, needed=None)
            if not position.owes_evaluation:  # owed at the start where a signal cut it short
                position = _step(run, position, report, saver, watch)
            stop = run.mesh.any(is_asked())
            if position.owes_evaluation and not stop:
                position = _evaluate(run, position, report, is_asked, watch)
                stop = position.owes_evaluation
            is_due = _due(position.step, config.checkpoint.every, steps)
            if is_due or (stop and config.checkpoint.every):
                watch.rest(f"saving step {position.step}")
                saver.save(position.step, run.engine.state(), beside_tensors(run, position))
        watch.rest("finishing")
        saver.wait()
        _report_saves(saver, report, needed=position.step)
        if stop:
            report.stopped(position.step)
        else:
            report.finish()
    return not stop


def _step(run: Run, position: Position, report: Report, saver: Saver, watch: Watch) -> Position:
    """One optimizer step and its metrics; where the run then stands."""
    watch.mark(f"step {position.step + 1}")
    config, started = run.config, time.perf_counter()
    is_due = _due(position.step + 1, config.log.every, config.train.steps)
    ranked = num_ranked(config.moe) if config.log.trace and is_due else 0
    result = train_step(run, position, ranked)
    before, position = position, advance(position, config, result)
    report.step_took(time.perf_counter() - started, result.data_s)
    if result.is_bad or result.is_spike:
        report.went_wrong(position.step, result)
    if moves := changes(before.autopilot, position.autopilot):
        report.moved(position.step, moves)
    is_over = _is_over(position, result, config.train)
    if is_over or is_due:
        means = reduce(result.parts, result.counts, run.mesh, result.batch_balance)
        report.train(position, result, means)
    if is_over:
        watch.rest("waiting for a save")
        saver.wait()  # what is being written is where to go back to
        raise DivergedError(_diverged(run, position, result))
    return position


def _evaluate(
    run: Run, position: Position, report: Report, is_asked: Callable[[], bool], watch: Watch
) -> Position:
    """Evaluate, unless some rank is asked to stop meanwhile; then it stays owed."""

    def is_interrupted() -> bool:
        watch.mark(f"evaluation after step {position.step}")
        return run.mesh.any(is_asked())

    model, config = run.engine.model, run.config
    means = evaluate(model, run.held_out, config.eval.sequences, config, run.mesh, is_interrupted)
    if means is None:
        return position
    report.evaluation(position.step, means)
    return replace(position, owes_evaluation=False)


def advance(position: Position, config: Config, result: StepResult) -> Position:
    """Where a run stands after one more step."""
    batch, (loss, grad_norm, was_skipped) = config.train.global_batch, result.outcome
    window, autopilot = position.window, position.autopilot
    return Position(
        position.step + 1,
        position.samples + batch,
        position.tokens + int(result.counts.tokens),
        position.bad_steps + result.is_bad,
        position.bad_in_a_row + 1 if was_skipped else 0,
        _due(position.step + 1, config.eval.every, config.train.steps),
        spikes=position.spikes + result.is_spike,
        window=window if was_skipped else window.after(loss, grad_norm, result.is_spike),
        autopilot=autopilot.after(result.tally, config.moe.target_drop_rate),
    )


def _is_over(position: Position, result: StepResult, train: TrainConfig) -> bool:
    """Whether the run must not go on after this step."""
    is_stopped = result.is_spike and train.spike_response == "stop"
    return is_stopped or position.bad_in_a_row >= train.max_bad_steps


def _diverged(run: Run, position: Position, result: StepResult) -> str:
    """Why it must not, and what to do."""
    train, row = run.config.train, position.bad_in_a_row
    if result.is_spike and train.spike_response == "stop":
        loss, grad_norm, _ = result.outcome
        saved = checkpoint.latest(run.folder)
        return (
            f"step {position.step} is a spike: {describe(loss, grad_norm, result.limits)}; it was "
            f"not applied (train.spike_response stop), and {saved.name if saved else 'no step'} is "
            "the newest checkpoint; to go on from there and past this step, try a train.lr below "
            f"{train.lr:g}, a train.spike_sigmas above {train.spike_sigmas:g}, or a "
            "train.spike_response of skip or warn"
        )
    what = "not finite or a spike" if train.spike_response == "skip" else "not finite"
    return (
        f"loss or gradient was {what} in {row} step{'s' * (row > 1)} in a row, up to step "
        f"{position.step} (train.max_bad_steps {train.max_bad_steps}); try a train.lr below "
        f"{train.lr:g} or more train.warmup_steps, from an earlier checkpoint "
        "(checkpoint.resume PATH) or from the start (another name)"
    )


def _due(step: int, every: int, last: int) -> bool:
    """Whether a periodic thing happens after this step: every n-th, and the last; 0 is never."""
    return every > 0 and (step % every == 0 or step == last)


def _report_saves(saver: Saver, report: Report, needed: int | None) -> None:
    """Say how saves have ended. Training goes on without one that failed, but for the last, of step
    `needed`."""
    for step, error, seconds in saver.outcomes():
        if error is None:
            report.saved(step, seconds)
        elif step == needed or not isinstance(error, CheckpointError):
            raise error
        else:
            report.not_saved(error)
