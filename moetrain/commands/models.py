"""Commands that make a model of another: of other formats, and with other experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from moetrain.commands.base import OutPath, RunPath, app, require, warn
from moetrain.hf.names import DtypeName, FormatName


@app.command(name="export")
@dataclass(frozen=True)
class Export:
    """Write the model of a checkpoint in a format of Hugging Face, for transformers, vLLM and
    others."""

    path: RunPath
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    out: OutPath
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
    out: OutPath
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
    out: OutPath
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
        require(self.experts > 0, "experts", self.experts, "1 or more")
        require(self.split > 0, "split", self.split, "1 or more")
        require(0 <= self.noise < float("inf"), "noise", self.noise, "0 or more")
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
    out: OutPath
    """Folder to write; must not exist."""
    parts: int = 2
    """Experts that each one becomes."""
    by: Literal["cut", "copy"] = "cut"
    """cut: of a part of its width; copy: of all of it."""
    top_k: int | None = None
    """Experts per token; null: as many times more, which keeps the logits."""

    def run(self) -> int:
        """Write and print the path."""
        _check_sizes(self.parts, self.top_k)
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
    out: OutPath
    """Folder to write; must not exist."""
    parts: int = 2
    """Experts that become one."""
    by: Literal["join", "average"] = "join"
    """join: as wide as all of them; average: their mean."""
    top_k: int | None = None
    """Experts per token; null: as many times fewer."""

    def run(self) -> int:
        """Write and print the path."""
        _check_sizes(self.parts, self.top_k)
        from moetrain.resize import merge

        warn(merge(self.path, self.out, self.parts, self.by, self.top_k))
        print(self.out)
        return 0


def _check_sizes(parts: int, top_k: int | None) -> None:
    require(parts > 1, "parts", parts, "2 or more")
    require(top_k is None or top_k > 0, "top-k", top_k, "1 or more")
