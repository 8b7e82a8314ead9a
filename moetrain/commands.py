"""The commands of `moetrain`: what each takes, and the one function it calls.

A command imports that function when it runs, so `moetrain --help` loads neither torch nor datasets.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from moetrain import settings
from moetrain.cautions import cautions
from moetrain.config import Config, DataConfig
from moetrain.constraints import check_world
from moetrain.errors import UserError
from moetrain.hf.names import DtypeName, FormatName
from moetrain.inherited import resolve_run
from moetrain.redact import redact
from moetrain.saying import forget, say

Flags = Annotated[dict[str, Any], arg(constructor=settings.flags_of(Config), name="")]
READING = ("subset", "split", "streaming", "field", "max_documents")
"""The settings of data that say how a source is read."""
CorpusFlags = Annotated[
    dict[str, Any], arg(constructor=settings.flags_of(DataConfig, READING), name="data")
]
TextFlags = Annotated[
    dict[str, Any], arg(constructor=settings.flags_of(DataConfig, (*READING, "cache")), name="data")
]
DropPolicy = Literal["position", "probability", "random", "spill"]
ConfigPath = Positional[Annotated[Path, arg(metavar="CONFIG")]]
RunPath = Positional[Annotated[Path, arg(metavar="RUN_OR_CHECKPOINT")]]


app, checkpoint_app = SubcommandApp(), SubcommandApp()
data_app, tokenizer_app = SubcommandApp(), SubcommandApp()


class Command(Protocol):
    """A parsed command line, ready to run."""

    def run(self) -> int:
        """Do what was asked; return the exit code."""
        ...


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
    source: tuple[str, ...] = ()
    """Texts to read instead of the run's own, each by itself and whole: as data.source."""
    split: Literal["eval", "train"] = "eval"
    """Held-out documents, which all of a --source are, or those trained on."""
    sequences: int | None = None
    """Sequences to read; null: as many as the run's eval.sequences, and all of a --source."""

    def run(self) -> int:
        """Print the loss."""
        if self.sequences is not None:
            _require(self.sequences > 0, "sequences", self.sequences, "1 or more")
        if self.source:
            texts = self._texts()
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

    def _texts(self) -> list[DataConfig]:
        if self.split != "eval":
            raise UserError(
                f"--split ({self.split}) is of the run's own text, and a --source is read whole; "
                "drop one of the two"
            )
        given = [{"data": {**self.data, "source": source}} for source in self.source]
        configs = [settings.resolve(None, values) for values in given]
        warn([caution for config in configs for caution in cautions(config)])
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
        _require(self.max_tokens > 0, "max-tokens", self.max_tokens, "1 or more")
        _require(
            0 < self.temperature < float("inf"),
            "temperature",
            self.temperature,
            "above 0 (or use --greedy)",
        )
        _require(self.top_k is None or self.top_k > 0, "top-k", self.top_k, "1 or more")
        _require(0 < self.top_p <= 1, "top-p", self.top_p, "above 0 and at most 1")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
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
    replay as recorded is not what metrics.jsonl says. Several values make a row each."""

    path: Positional[Annotated[Path, arg(metavar="RUN_OR_TRACE")]]
    """Folder of a run that was trained with log.trace, or of its trace."""
    capacity_factor: tuple[float | None, ...] = ()
    """Slots per expert over the mean demand; null: dropless."""
    drop_policy: tuple[DropPolicy, ...] = ()
    """Who keeps a slot of a full expert."""
    group: tuple[Literal["sequence", "microbatch"] | int, ...] = ()
    """Tokens among which capacity is enforced."""
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
        for flag in ("spill_depth", "top_k", "ep", "world_size"):
            for value in getattr(self, flag):
                _require(value > 0, flag.replace("_", "-"), value, "1 or more")
        from moetrain.replay import settings_of
        from moetrain.what_if import run

        wanted = settings_of(
            capacity_factor=self.capacity_factor,
            drop_policy=self.drop_policy,
            group=self.group,
            spill_depth=self.spill_depth,
            top_k=self.top_k,
            ep=self.ep,
            world=self.world_size,
        )
        return run(self.path, wanted, self.out)


@app.command(name="export")
@dataclass(frozen=True)
class Export:
    """Write the model of a checkpoint in a format of Hugging Face, for transformers, vLLM and
    others."""

    path: RunPath
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to write; must not exist."""
    format: FormatName
    """Whose configuration and names of tensors."""
    dtype: DtypeName = "bf16"
    """What the tensors are written in."""
    approximate: bool = False
    """Export what the format expresses only approximately, too, and say in which ways."""

    def run(self) -> int:
        """Write, say what is approximate, and print the path."""
        from moetrain.hf.exporting import export

        stated = export(self.path, self.out, self.format, self.dtype, self.approximate)
        warn([f"{self.format}: {line}" for line in stated])
        print(self.out)
        return 0


@app.command(name="import")
@dataclass(frozen=True)
class Import:
    """Write a model of Hugging Face's formats as a checkpoint, to generate, evaluate and train on
    from."""

    source: Positional[Annotated[str, arg(metavar="HF_DIR_OR_NAME")]]
    """Folder of the model, or its name on the hub."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to write; must not exist."""
    tokenizer: str | None = None
    """Instead of the model's own: bytes, a tokenizer.json, or a model name on the hub."""

    def run(self) -> int:
        """Write and print the path."""
        from moetrain.hf.importing import import_model

        import_model(self.source, self.out, self.tokenizer)
        print(self.out)
        return 0


@app.command(name="upcycle")
@dataclass(frozen=True)
class Upcycle:
    """Make a mixture of experts of a dense model of Hugging Face, as a checkpoint to train on from:
    every expert begins as its feed-forward layer."""

    dense: Positional[Annotated[str, arg(metavar="HF_DIR_OR_NAME")]]
    """Folder of a model in the format llama, mistral or qwen3, or its name on the hub."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to write; must not exist."""
    experts: int = 8
    """Experts in a block."""
    top_k: int = 2
    """How many of them a token chooses."""
    every: int = 1
    """Every n-th block gets experts, the others stay dense."""
    split: int = 1
    """Cut every expert into so many finer ones, of which a token chooses as many times more."""
    noise: float = 0.0
    """Standard deviation of what is added to every expert, over that of a fresh one."""
    seed: int = 0
    """Seed of the routers and of the noise."""
    tokenizer: str | None = None
    """Instead of the model's own: bytes, a tokenizer.json, or a model name on the hub."""

    def run(self) -> int:
        """Write and print the path."""
        _require(self.experts > 0, "experts", self.experts, "1 or more")
        _require(self.split > 0, "split", self.split, "1 or more")
        _require(0 <= self.noise < float("inf"), "noise", self.noise, "0 or more")
        from moetrain.upcycle import upcycle

        upcycle(
            self.dense,
            self.out,
            experts=self.experts,
            top_k=self.top_k,
            every=self.every,
            split=self.split,
            noise=self.noise,
            seed=self.seed,
            tokenizer=self.tokenizer,
        )
        print(self.out)
        return 0


@app.command(name="split")
@dataclass(frozen=True)
class Split:
    """Give a model more experts, with the same logits: every expert becomes several. Written as a
    checkpoint to train on from."""

    path: RunPath
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to write; must not exist."""
    parts: int = 2
    """Experts that each one becomes."""
    by: Literal["cut", "copy"] = "cut"
    """cut: of a part of its width; copy: of all of it."""
    top_k: int | None = None
    """Experts per token; null: as many times more, which keeps the logits."""

    def run(self) -> int:
        """Write and print the path."""
        _check_resize(self.parts, self.top_k)
        from moetrain.resize import split

        warn(split(self.path, self.out, self.parts, self.by, self.top_k))
        print(self.out)
        return 0


@app.command(name="merge")
@dataclass(frozen=True)
class Merge:
    """Give a model fewer experts: neighbouring ones become one. Undoes a split; of other models it
    makes an approximation, to be trained on from."""

    path: RunPath
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to write; must not exist."""
    parts: int = 2
    """Experts that become one."""
    by: Literal["join", "average"] = "join"
    """join: as wide as all of them; average: their mean."""
    top_k: int | None = None
    """Experts per token; null: as many times fewer."""

    def run(self) -> int:
        """Write and print the path."""
        _check_resize(self.parts, self.top_k)
        from moetrain.resize import merge

        warn(merge(self.path, self.out, self.parts, self.by, self.top_k))
        print(self.out)
        return 0


def _check_resize(parts: int, top_k: int | None) -> None:
    _require(parts > 1, "parts", parts, "2 or more")
    _require(top_k is None or top_k > 0, "top-k", top_k, "1 or more")


@checkpoint_app.command(name="list")
@dataclass(frozen=True)
class CheckpointList:
    """List the checkpoints of a run, and which one it would continue from."""

    path: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Folder of a run."""

    def run(self) -> int:
        """Print the table."""
        from moetrain.checkpoint.inspect import print_list

        print_list(self.path)
        return 0


@checkpoint_app.command(name="show")
@dataclass(frozen=True)
class CheckpointShow:
    """Show what a checkpoint holds."""

    path: RunPath
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    tensors: bool = False
    """Show every tensor, not the first few."""

    def run(self) -> int:
        """Print it."""
        from moetrain.checkpoint.inspect import print_checkpoint

        print_checkpoint(self.path, self.tensors)
        return 0


@checkpoint_app.command(name="verify")
@dataclass(frozen=True)
class CheckpointVerify:
    """Read every byte of a checkpoint and say what is damaged; exit code 2 if anything is."""

    path: RunPath
    """Folder of a run (all its checkpoints) or of one checkpoint."""

    def run(self) -> int:
        """Print every checkpoint's state."""
        from moetrain.checkpoint.inspect import verify

        return verify(self.path)


@checkpoint_app.command(name="diff")
@dataclass(frozen=True)
class CheckpointDiff:
    """Compare two checkpoints; exit code 0 if their tensors are the same bit by bit, else 1."""

    left: Positional[Annotated[Path, arg(metavar="A")]]
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    right: Positional[Annotated[Path, arg(metavar="B")]]
    """The other."""

    def run(self) -> int:
        """Print what differs."""
        from moetrain.checkpoint.diff import print_diff

        return print_diff(self.left, self.right)


@checkpoint_app.command(name="convert")
@dataclass(frozen=True)
class CheckpointConvert:
    """Verify a checkpoint and write it in one piece, here or for other programs."""

    path: RunPath
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """What to write: a folder, or with torch a file; must not exist."""
    format: Literal["moetrain", "safetensors", "torch"]
    """moetrain: to resume, evaluate and generate from; the others for other programs."""
    weights_only: bool = False
    """Leave out the optimizer's moments."""
    dtype: Literal["bf16"] | None = None
    """safetensors and torch: round the model's tensors; null: keep them as they are."""

    def run(self) -> int:
        """Write and print the path."""
        from moetrain.convert import convert

        convert(self.path, self.out, self.format, self.weights_only, bf16=self.dtype == "bf16")
        print(self.out)
        return 0


@data_app.command(name="prepare")
@dataclass(frozen=True)
class DataPrepare:
    """Tokenize and pack the text of a configuration now, as training would at its start."""

    flags: Flags
    config: Positional[Annotated[Path | None, arg(metavar="[CONFIG]")]] = None
    """YAML file of settings; without it, flags lie over the defaults."""

    def run(self) -> int:
        """Prepare and print the folder."""
        config = resolve_run(self.config, self.flags)
        from moetrain.data import prepare

        print(prepare(config.data).directory)
        return 0


@tokenizer_app.command(name="train")
@dataclass(frozen=True)
class TokenizerTrain:
    """Train a byte-level BPE tokenizer and write it as a tokenizer.json."""

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """Text to learn from, as data.source: stdlib, a path, a glob or a dataset of the hub."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """File to write."""
    data: CorpusFlags
    vocab_size: int = 8192
    """Entries of the vocabulary."""

    def run(self) -> int:
        """Train and write; print the file."""
        _require(self.vocab_size > 256, "vocab-size", self.vocab_size, "above 256, one per byte")
        data = settings.resolve(None, {"data": {**self.data, "source": self.source}}).data
        _require(data.format == "text", "data.format", data.format, "text, to learn merges from")
        from moetrain.data import open_source, train_bpe

        train_bpe(open_source(data).documents(), vocab_size=self.vocab_size, out=self.out)
        print(self.out)
        return 0


app.command(checkpoint_app, name="checkpoint", help="Inspect, verify and convert checkpoints.")
app.command(data_app, name="data", help="Prepare the training text.")
app.command(tokenizer_app, name="tokenizer", help="Make a tokenizer.")


def _require(holds: bool, flag: str, value: object, legal: str) -> None:
    if not holds:
        raise UserError(f"--{flag} ({value}) must be {legal}")


def warn(messages: Sequence[str]) -> None:
    """Say warnings, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        for message in messages:
            say(redact(f"moetrain: warning: {message}"))
