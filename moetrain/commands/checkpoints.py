"""Commands that look at checkpoints, and write them anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from moetrain.commands.base import RunPath

checkpoint_app = SubcommandApp()


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
