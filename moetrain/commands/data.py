"""Commands that prepare text and tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from moetrain import settings
from moetrain.commands.base import CorpusFlags, Flags, require
from moetrain.inherited import resolve_run

data_app, tokenizer_app = SubcommandApp(), SubcommandApp()


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
        require(self.vocab_size > 256, "vocab-size", self.vocab_size, "above 256, one per byte")
        data = settings.resolve(None, {"data": {**self.data, "source": self.source}}).data
        from moetrain.data import open_source, train_bpe

        train_bpe(open_source(data).documents(), vocab_size=self.vocab_size, out=self.out)
        print(self.out)
        return 0
