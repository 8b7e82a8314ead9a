"""Whole runs on a small local text, through the command line."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor

from moetrain import checkpoint, cli, restore, settings
from moetrain.config import Config
from moetrain.engines import Engine
from moetrain.errors import DivergedError
from moetrain.mesh import Mesh, process_group
from moetrain.model import Transformer
from moetrain.optim import StepOutcome
from moetrain.sinks import read_metrics
from moetrain.spikes import Limits
from moetrain.testing import simulate_ranks
from moetrain.train import set_up
from moetrain.train import train as train_run

SMALL_RUN: dict[str, dict[str, Any]] = {
    "model": {"dim": 16, "layers": 2, "heads": 2, "kv_heads": 1},
    "moe": {"experts": 4, "expert_ffn_dim": 16, "capacity_factor": 1.0, "first_dense": 1},
    "data": {"seq_len": 32, "eval_fraction": 0.1},
    "train": {"steps": 8, "global_batch": 8, "micro_batch": 2, "warmup_steps": 2, "lr": 3e-3},
    "eval": {"every": 3, "sequences": 6},
    # Simulated ranks are threads, each with groups of its own: none may save beside it.
    "checkpoint": {"every": 3, "asynchronous": False},
    "log": {"every": 1},
}
TIMINGS = (
    *("tokens_per_s", "tflops_per_device", "step_time_s", "mfu", "memory_gib"),
    *("step_time_s_by_rank", "data_s_by_rank", "probe_s_by_rank"),
)


def write_text(folder: Path) -> None:
    """30 documents of 200 words out of 50: something to learn."""
    folder.mkdir()
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshr", k=chance.randint(2, 8))) for _ in range(50)]
    for number in range(30):
        (folder / f"{number:02d}.txt").write_text(" ".join(chance.choices(words, k=200)))


def write_config(folder: Path, name: str = "run", **sections: dict[str, Any]) -> Path:
    """`SMALL_RUN` with other values over it, as YAML, next to a text of its own."""
    if not (folder / "text").exists():
        write_text(folder / "text")
    values = {
        section: {**SMALL_RUN.get(section, {}), **sections.get(section, {})}
        for section in SMALL_RUN.keys() | sections.keys()
    }
    values["data"] |= {"source": str(folder / "text"), "cache": str(folder / "cache")}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"name": name, "out": str(folder / "runs"), **values}))
    return path


def write_start(folder: Path, start: Path, **sections: dict[str, Any]) -> Path:
    """A run `on` from the weights of another, whose shape it leaves to them, as YAML."""
    write_config(folder)  # for its text
    data = {"source": str(folder / "text"), "cache": str(folder / "cache"), "seq_len": 32}
    train = {"steps": 2, "global_batch": 2, "micro_batch": 2, "warmup_steps": 0}
    values = {
        **{"name": "on", "out": str(folder / "runs"), "init_from": str(start)},
        **sections,
        "data": {**data, **sections.get("data", {})},
        "train": {**train, **sections.get("train", {})},
        "log": {"every": 1},
    }
    path = folder / "on.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def without_pictures() -> Any:
    """A context in which runs end without; drawing takes longer than the training here."""
    return mock.patch("moetrain.report.write_plots", return_value=[])


def train(config: Path, *flags: object) -> int:
    """`moetrain train` in this process, without pictures; returns its exit code."""
    with without_pictures():
        return cli.main(["train", str(config), *map(str, flags)])


class Spoiled:
    """An engine in front of the real one, in which rank 1 multiplies its loss in some steps."""

    def __init__(self, engine: Engine, rank: int, first: int, bad: frozenset[int], factor: float):
        """`first` is the step to come."""
        self.engine, self.model, self.state = engine, engine.model, engine.state
        self.rank, self.coming, self.bad, self.factor = rank, first, bad, factor

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """See `Engine`."""
        is_bad = self.rank == 1 and self.coming in self.bad
        self.engine.backward(loss * self.factor if is_bad else loss, last)

    def step(self, lr: float, limits: Limits) -> StepOutcome:
        """See `Engine`."""
        self.coming += 1
        return self.engine.step(lr, limits)


def train_on(
    world: int,
    config: Path,
    *flags: object,
    bad: frozenset[int] = frozenset(),
    factor: float = math.nan,
    first: int = 1,
) -> tuple[Path, list[str]]:
    """Train on simulated ranks, with bad steps on the way; returns the folder of the run and what
    each rank has to say at the end."""
    made = settings.load(config, [str(flag) for flag in flags])

    def of_rank() -> str:
        mesh = Mesh(torch.device("cpu"), made.parallel.ep, made.parallel.dp_replicate)
        run = set_up(made, made.out / made.name, mesh)
        spoiled = Spoiled(run.engine, mesh.rank, first, bad, factor)
        try:
            train_run(dataclasses.replace(run, engine=spoiled))
        except DivergedError as error:
            return str(error)
        return ""

    with without_pictures():
        return made.out / made.name, simulate_ranks(world, of_rank)


def save_model(run: Path, config: Config, model: Transformer, text: str = "") -> Path:
    """A checkpoint of step 1 that holds a model alone, for the bytes tokenizer.

    `text` is the fingerprint of what it was trained on.
    """
    extra = {
        "config": config.model_dump(mode="json"),
        "vocab_size": model.embedding.num_embeddings,
        "tokenizer": "bytes",
        "order": {"data": text},
    }
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {f"model.{name}": value.detach() for name, value in named}
    with process_group():
        return checkpoint.save(run, 1, tensors, extra)


def model_of(run: Path) -> Transformer:
    """The model of a run's newest checkpoint, whole."""
    with process_group() as device:
        return restore.model_on_device(restore.find(run), device)


def lines_without_timings(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in TIMINGS}
        for line in read_metrics(run)
    ]


def saved_tensors(path: Path) -> dict[str, Tensor]:
    """Weights, moments and step counts of a checkpoint, in full."""
    entries = checkpoint.read_manifest(path).tensors
    tensors = {
        name: torch.full(entry.shape, float("nan"), dtype=getattr(torch, entry.dtype))
        for name, entry in entries.items()
    }
    with process_group():
        checkpoint.load(path, tensors)
    return tensors


def assert_same_bits(one: Path, other: Path) -> None:
    """Two checkpoints hold the same tensors."""
    ours, theirs = saved_tensors(one), saved_tensors(other)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("model.") for name in ours)
    assert any(name.endswith(".exp_avg_sq") for name in ours)
    for name, tensor in ours.items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, theirs[name]), name
