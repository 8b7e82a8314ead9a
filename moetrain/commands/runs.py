"""Commands that train a model, and ask a trained one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from moetrain import settings
from moetrain.cautions import cautions
from moetrain.commands.base import ConfigPath, Flags, RunPath, TextFlags, app, require, warn
from moetrain.config import DataConfig
from moetrain.constraints import check_world
from moetrain.errors import UserError
from moetrain.inherited import resolve_run
from moetrain.saying import forget

DropPolicy = Literal["position", "probability", "random", "spill"]


@app.command(name="train")
@dataclass(frozen=True)
class Train:
    """Train a model; under torchrun, together with all its ranks."""

    config: ConfigPath
    """YAML file of settings; flags lie over it."""
    flags: Flags

    def run(self) -> int:
        """Train to the last step."""
        config = resolve_run(self.config, self.flags)
        check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
        warn(cautions(config))
        from moetrain.train import run

        code = run(config)
        forget(sys.stdout)  # what nobody heard of it is no failure
        return code


@app.command(name="check")
@dataclass(frozen=True)
class Check:
    """Check a configuration for a number of ranks and show mesh, parameters and memory."""

    config: ConfigPath
    """YAML file of settings; flags lie over it."""
    flags: Flags
    world_size: int
    """Ranks (processes, usually one per GPU) that the run would have."""

    def run(self) -> int:
        """Print the report."""
        config = resolve_run(self.config, self.flags)
        check_world(config, self.world_size, settings.ranks_of_node())
        warn(cautions(config))
        from moetrain.check import report

        print(report(config, self.world_size))
        return 0


@app.command(name="eval")
@dataclass(frozen=True)
class Eval:
    """Measure the loss of a checkpoint; under torchrun, on all its ranks."""

    path: RunPath
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    data: TextFlags
    source: tuple[str, ...] | None = None
    """Texts to read instead of the run's own, each by itself and whole: as data.source."""
    split: Literal["eval", "train"] = "eval"
    """Held-out documents, which all of a --source are, or those trained on."""
    sequences: int | None = None
    """Sequences to read; null: as many as the run's eval.sequences, and all of a --source."""

    def run(self) -> int:
        """Print the loss."""
        if self.sequences is not None:
            require(self.sequences > 0, "sequences", self.sequences, "1 or more")
        if self.source is not None:
            texts = self._texts(self.source)
            from moetrain.evaluate import run_on

            run_on(self.path, texts, sequences=self.sequences)
            return 0
        if self.data:
            flag = next(iter(self.data)).replace("_", "-")
            raise UserError(
                f"--data.{flag} has no effect without --source: the run's own text is read as in "
                "training; drop it, or name a source"
            )
        from moetrain.evaluate import run

        run(self.path, split=self.split, sequences=self.sequences)
        return 0

    def _texts(self, sources: Sequence[str]) -> list[DataConfig]:
        if not sources:
            raise UserError("--source needs one text or more, as data.source names them")
        if self.split != "eval":
            raise UserError(
                f"--split ({self.split}) is of the run's own text, and a --source is read whole; "
                "drop one of the two"
            )
        given = [{"data": {**self.data, "source": source}} for source in sources]
        configs = [settings.resolve(None, values) for values in given]
        warn(list(dict.fromkeys(caution for made in configs for caution in cautions(made))))
        return [config.data for config in configs]


@app.command(name="generate")
@dataclass(frozen=True)
class Generate:
    """Continue a text with a trained model."""

    path: RunPath
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    prompt: str
    """The text to continue."""
    max_tokens: int = 128
    """Tokens to add."""
    temperature: float = 1.0
    """Divides the logits; below 1 sharpens the distribution."""
    top_k: int | None = None
    """Sample from the k likeliest tokens alone; null: from all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together reach this probability."""
    greedy: bool = False
    """Take the likeliest token each time, without sampling."""
    chat: bool = False
    """The prompt is a user's message; print the answer alone."""
    seed: int = 0
    """Seed of the sampling."""

    def run(self) -> int:
        """Print the continuation."""
        self._check()
        from moetrain.generate import run

        run(
            self.path,
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            greedy=self.greedy,
            seed=self.seed,
            chat=self.chat,
        )
        return 0

    def _check(self) -> None:
        require(self.max_tokens > 0, "max-tokens", self.max_tokens, "1 or more")
        require(
            0 < self.temperature < float("inf"),
            "temperature",
            self.temperature,
            "above 0 (or use --greedy)",
        )
        require(self.top_k is None or self.top_k > 0, "top-k", self.top_k, "1 or more")
        require(0 < self.top_p <= 1, "top-p", self.top_p, "above 0 and at most 1")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        sampling = (self.temperature, self.top_k, self.top_p, self.seed)
        if self.greedy and sampling != (1.0, None, 1.0, 0):
            raise UserError(
                "--greedy does not sample, so --temperature, --top-k, --top-p and --seed have no "
                "effect; drop them or --greedy"
            )


@app.command(name="replay")
@dataclass(frozen=True)
class Replay:
    """Ask a routing trace what other settings would have dropped and sent; exit code 1 if its
    replay as recorded is not what metrics.jsonl says. Several values make a row each; what is not
    given stays as recorded."""

    path: Positional[Annotated[Path, arg(metavar="RUN_OR_TRACE")]]
    """Folder of a run that was trained with log.trace, or of its trace."""
    capacity_factor: tuple[float | None, ...] = ()
    """Slots per expert over the mean demand; null: dropless."""
    drop_policy: tuple[DropPolicy, ...] = ()
    """Who keeps a slot of a full expert."""
    group: tuple[Literal["sequence", "microbatch"] | int, ...] = ()
    """Tokens among which capacity is enforced."""
    min_capacity: tuple[int, ...] = ()
    """Slots that an expert has at least."""
    spill_depth: tuple[int, ...] = ()
    """How many further experts a losing choice may ask, with drop policy spill."""
    top_k: tuple[int, ...] = ()
    """Experts per token."""
    ep: tuple[int, ...] = ()
    """Ranks that share one set of experts."""
    world_size: tuple[int, ...] = ()
    """Ranks; where it is not given, as recorded, or as many as ep."""
    out: Path | None = None
    """JSON file for all figures by step and layer."""

    def run(self) -> int:
        """Print the table."""
        for flag in ("min_capacity", "spill_depth", "top_k", "ep", "world_size"):
            for value in getattr(self, flag):
                require(value > 0, flag.replace("_", "-"), value, "1 or more")
        from moetrain.replay import settings_of
        from moetrain.what_if import run

        wanted = settings_of(
            capacity_factor=self.capacity_factor,
            drop_policy=self.drop_policy,
            group=self.group,
            min_capacity=self.min_capacity,
            spill_depth=self.spill_depth,
            top_k=self.top_k,
            ep=self.ep,
            world=self.world_size,
        )
        return run(self.path, wanted, self.out)
