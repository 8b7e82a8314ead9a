"""What a run tells while it goes and leaves behind: metrics, live progress, wandb, plots, traces.

Rank 0 does the writing, but for the trace, of which every rank writes its part; the methods are
called on every rank.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, Self

from moetrain import metrics, settings
from moetrain.checkpoint import latest, read_manifest
from moetrain.config import CheckpointConfig, Config
from moetrain.data import Prepared, beside
from moetrain.errors import UserError
from moetrain.evaluate import nats_per_byte
from moetrain.hf.names import KEPT, TEMPLATE_FILE, TOKENIZER_CONFIG
from moetrain.mesh import Mesh, raise_alike
from moetrain.model import Transformer
from moetrain.objective import Means
from moetrain.peaks import device_name, device_peak_flops
from moetrain.plots import PLOTS_FOLDER, write_plots
from moetrain.precision import computes_in, multiplies_bf16
from moetrain.progress import progress
from moetrain.redact import redact
from moetrain.restore import TOKENIZER_FILE
from moetrain.sinks import MetricsLog, read_metrics
from moetrain.sizes import Sizes, sizes, train_flops_per_token
from moetrain.spikes import describe
from moetrain.step import Position, StepResult, sample_indices
from moetrain.stragglers import RankClock, Streaks, slow_ranks
from moetrain.trace import TraceLog, drop_later_steps
from moetrain.wandb_sink import KEEP_S, WandbSink

SLOW_BF16 = (
    "engine.precision (bf16) is not what this machine has instructions for: products may take "
    "far longer than in fp32; set it to fp32, or to auto, which is fp32 here"
)


class Report:
    """Turns the numbers of a run into lines and sends them to the run's folder and the screen."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        mesh: Mesh,
        prepared: Prepared,
        model: Transformer,
        start: Position,
    ):
        """Open the sinks (rank 0); what was logged after `start` is dropped. A collective.

        Raises UserError, alike on every rank, where the folder cannot be written.
        """
        self._config, self._folder, self._mesh = config, folder, mesh
        self._prepared = prepared
        self._flops_per_token = train_flops_per_token(model, config.data.seq_len)
        self._peak_flops = device_peak_flops(mesh.device, computes_in(config.engine))
        self._steps, self._seconds, self._data_s, self._tokens = 0, 0.0, 0.0, start.tokens
        self._last_step_s, self._is_late = 0.0, False
        self._clock, self._streaks = RankClock(mesh), Streaks()
        self._is_writer = mesh.rank == 0
        self._closing = ExitStack()
        self._wandb: WandbSink | None = None
        error = None
        if self._is_writer:
            try:
                self._save_settings(is_new=start.step == 0)
                # No rank writes before: the first step waits for rank 0.
                drop_later_steps(folder, start.step)
                self._log = MetricsLog(folder, start.step, start.owes_evaluation)
            except OSError as problem:
                error = (
                    f"out ({config.out}) cannot hold {folder}: {problem}; make room, or set another"
                )
        raise_alike(error)
        if self._is_writer:
            self._open(model, start)
        self._trace = TraceLog(folder, config, mesh.rank, mesh.world)

    def _save_settings(self, is_new: bool) -> None:
        """What is needed to load the run's checkpoints elsewhere; an earlier run of the name may
        have left such files of its own."""
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        settings.save(self._config, folder / "config.yaml")
        path, new = folder / TOKENIZER_FILE, folder / f"{TOKENIZER_FILE}.new"
        self._prepared.tokenizer.save(new)
        if new.exists():
            new.replace(path)
        else:
            path.unlink(missing_ok=True)
        for file, origin in self._beside().items() if is_new else ():
            if origin is None:
                (folder / file).unlink(missing_ok=True)
            elif origin.resolve() != (folder / file).resolve():
                shutil.copyfile(origin, folder / file)
        if (chat := self._prepared.chat) is not None:
            (folder / TEMPLATE_FILE).write_text(chat.template, encoding="utf-8")

    def _beside(self) -> dict[str, Path | None]:
        """Files that say what the model is beside its weights, and where they come from, if
        anywhere: from what it started with, or of a chat from its tokenizer."""
        start, name = self._config.init_from, self._config.data.tokenizer
        found: dict[str, Path | None] = dict.fromkeys(KEPT)
        if start is not None:
            there = {file: start.parent.parent / file for file in KEPT}
            found |= {file: path for file, path in there.items() if path.exists()}
        if self._prepared.chat is not None and found[TOKENIZER_CONFIG] is None:
            found[TOKENIZER_CONFIG] = beside(name, TOKENIZER_CONFIG)
        return found

    def _open(self, model: Transformer, start: Position) -> None:
        config, folder, counted = self._config, self._folder, sizes(model)
        self._closing.callback(self._log.close)
        if config.log.wandb != "off":
            self._wandb = self._begin_wandb(config.log.wandb, start.step, counted)
            self._closing.callback(self._wandb.close)
        self._progress = progress(config.train.steps, has_experts=config.moe.experts > 0)
        self._closing.enter_context(self._progress)
        self._progress.note(
            f"{folder}: {counted.total:,} parameters, {counted.active:,} active, on "
            f"{self._mesh.world} rank{'s' * (self._mesh.world > 1)} ({self._mesh.device.type}, "
            f"{computes_in(config.engine)}), {_start(start.step, config.train.steps)}"
        )
        if config.engine.precision == "bf16" and not multiplies_bf16():
            self._progress.note(f"moetrain: warning: {SLOW_BF16}")

    def _begin_wandb(
        self, mode: Literal["offline", "online"], start_step: int, counted: Sizes
    ) -> WandbSink:
        """Begin or continue a run of wandb, with what is known of it by now."""
        config, device = self._config, self._mesh.device
        known = {
            "parameters": {"total": counted.total, "active": counted.active},
            "ranks": self._mesh.world,
            "device": device_name(device),
            "computes_in": computes_in(config.engine),
        }
        sink = WandbSink(
            self._folder,
            mode,
            config.log.wandb_project,
            config.name,
            {**settings.redacted(config), **known},
            resumed=start_step > 0,
        )
        if start_step and (earlier := self._evaluations()):
            sink.compare(min(earlier, key=itemgetter("eval_loss")))
        return sink

    def _evaluations(self) -> list[dict[str, Any]]:
        """The lines of the evaluations so far whose loss was finite."""
        return [x for x in read_metrics(self._folder) if x.get("eval_loss") is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def step_took(self, seconds: float, data_s: float) -> None:
        """Count the time of one optimizer step, without evaluation and checkpoints, and how much of
        it this rank took to read its batches."""
        self._steps += 1
        self._last_step_s = seconds
        self._seconds += seconds
        self._data_s += data_s

    def went_wrong(self, step: int, result: StepResult) -> None:
        """Report a step that was not finite, or a spike."""
        if self._is_writer:
            self._progress.note(_trouble(step, result))

    def moved(self, step: int, moves: str) -> None:
        """Report that layers go on with other capacity factors."""
        if self._is_writer:
            self._progress.note(f"step {step}: capacity factor {moves}")

    def train(self, position: Position, result: StepResult, means: Means) -> None:
        """Report the optimizer step just finished; speed is the mean since the last report.

        A collective: the times of all ranks are brought together.
        """
        step_time_s = self._seconds / self._steps
        rank_times = self._clock.times(step_time_s, self._data_s / self._steps)
        line = metrics.train_line(
            step=position.step,
            tokens=position.tokens,
            bad_steps=position.bad_steps,
            spikes=position.spikes,
            is_spike=result.is_spike,
            means=means,
            capacity_factors=result.capacity_factors,
            grad_norm=result.outcome.grad_norm,
            lr=result.lr,
            speed=metrics.speed(
                step_tokens=(position.tokens - self._tokens) / self._steps,
                step_time_s=step_time_s,
                rank_times=rank_times,
                flops_per_token=self._flops_per_token,
                devices=self._mesh.world,
                peak_flops=self._peak_flops,
            ),
            memory_gib=metrics.memory_gib(self._mesh.device),
        )
        self._steps, self._seconds, self._data_s, self._tokens = 0, 0.0, 0.0, position.tokens
        self._write(line)
        self._record(position, result)
        if self._is_writer:
            for note in self._streaks.notes(slow_ranks(rank_times, step_time_s)):
                self._progress.note(note)

    def _record(self, position: Position, result: StepResult) -> None:
        parts = [part.preferences for part in result.parts]
        if not any(parts):
            return
        first = position.samples - self._config.train.global_batch
        batches = sample_indices(self._config, self._mesh.rank, self._mesh.world, first)
        samples = [index for batch in batches for index in batch]
        self._trace.write(position.step, samples, parts, result.capacity_factors)

    def evaluation(self, step: int, means: Means) -> None:
        """Report an evaluation on held-out text."""
        if not means.targets:
            means = means._replace(loss=math.nan)  # of nothing, which must not look like the best
        per_byte = nats_per_byte(means.loss, self._prepared.manifest, self._config.data)
        self._write(metrics.eval_line(step=step, means=means, nats_per_byte=per_byte))

    def saved(self, step: int, seconds: float) -> None:
        """Report a checkpoint that took so long to write, and once where a stop takes too long."""
        if not self._is_writer:
            return
        self._progress.note(f"checkpoint of step {step} saved")
        late = _late(self._config.checkpoint, self._last_step_s, seconds)
        if late and not self._is_late:
            self._progress.note(f"moetrain: warning: {late}")
            self._is_late = True

    def not_saved(self, error: Exception) -> None:
        """Report a checkpoint that failed; training goes on."""
        if self._is_writer:
            text = f"moetrain: warning: {error}\ntraining goes on without it"
            self._progress.note(redact(text))

    def stopped(self, step: int) -> None:
        """Report the end by a signal."""
        if self._is_writer:
            steps = self._config.train.steps
            self._progress.note(f"stopped by a signal after step {step} of {steps}")

    def finish(self) -> None:
        """Give the last checkpoint to wandb where it is to keep it; draw the plots and say where
        they are."""
        if self._is_writer:
            if self._wandb is not None and self._config.keeps_artifacts:
                try:
                    self._keep_checkpoint(self._wandb)
                except (OSError, UserError) as error:
                    text = f"moetrain: warning: wandb gets no checkpoint: {error}"
                    self._progress.note(redact(text))
            pictures = write_plots(self._folder, self._prepared.manifest.byte_entropy)
            if names := ", ".join(path.name for path in pictures):
                self._progress.note(f"plots in {self._folder / PLOTS_FOLDER}: {names}")

    def _keep_checkpoint(self, sink: WandbSink) -> None:
        """Let wandb keep the newest checkpoint, in a folder as of a run."""
        saved = latest(self._folder)
        if saved is None:
            return
        step = read_manifest(saved).step
        beside = [self._folder / name for name in ("config.yaml", TOKENIZER_FILE, *KEPT)]
        files = [saved, *(path for path in beside if path.exists())]
        held_out = [line for line in self._evaluations() if line["step"] == step]
        is_asked = sink.keep(
            {path.relative_to(self._folder).as_posix(): path for path in files},
            self._config.name,
            {"step": step, **(held_out[-1] if held_out else {})},
        )
        if is_asked:
            self._progress.note(
                f"wandb is to keep the checkpoint of step {step} as {self._config.name}; the run "
                f"waits for it, {KEEP_S / 60:.0f} minutes at most"
            )

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._is_writer:
            self._log.write(line)
            self._progress.update(line)
            if self._wandb is not None:
                self._wandb.write(line)


def _trouble(step: int, result: StepResult) -> str:
    loss, grad_norm, was_skipped = result.outcome
    if result.is_bad:
        return f"step {step} skipped: the gradient norm is {grad_norm}"
    what = "a spike, skipped" if was_skipped else "a spike"
    return f"step {step} is {what}: {describe(loss, grad_norm, result.limits)}"


def _late(checkpoint: CheckpointConfig, step_s: float, save_s: float) -> str:
    """What there is to say where a run that is asked to stop may be ended before it has saved."""
    saves = 1 + checkpoint.asynchronous
    total_s = step_s + saves * save_s
    if not 0 < checkpoint.grace_s < total_s:
        return ""
    return (
        f"a stop may take {total_s:.3g} s, for a step ({step_s:.3g} s) and "
        f"{'a save' if saves == 1 else 'two saves'} ({save_s:.3g} s): more than "
        f"checkpoint.grace_s ({checkpoint.grace_s:g}); have the scheduler warn that long before, "
        "and set checkpoint.grace_s to it"
    )


def _start(resume_step: int, steps: int) -> str:
    if resume_step >= steps:
        return f"already at step {resume_step} of {steps}: nothing to train"
    return f"from step {resume_step}" if resume_step else "from the start"
