"""What commands have in common: how they are declared, checked, and warn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from moetrain import settings
from moetrain.config import Config, DataConfig
from moetrain.errors import UserError
from moetrain.redact import redact
from moetrain.saying import say

app = SubcommandApp()

Flags = Annotated[dict[str, Any], arg(constructor=settings.flags_of(Config), name="")]
READING = ("subset", "split", "streaming", "field", "max_documents")
"""The settings of data that say how a source is read."""
CorpusFlags = Annotated[
    dict[str, Any], arg(constructor=settings.flags_of(DataConfig, READING), name="data")
]
SCORING = (*READING, "format", "chat_template", "cache")
"""Those that say, too, what of it is evaluated, and where it is kept."""
TextFlags = Annotated[
    dict[str, Any], arg(constructor=settings.flags_of(DataConfig, SCORING), name="data")
]
ConfigPath = Positional[Annotated[Path, arg(metavar="CONFIG")]]
RunPath = Positional[Annotated[Path, arg(metavar="RUN_OR_CHECKPOINT")]]
OutPath = Positional[Annotated[Path, arg(metavar="OUT")]]


class Command(Protocol):
    """A parsed command line, ready to run."""

    def run(self) -> int:
        """Do what was asked; return the exit code."""
        ...


def require(holds: bool, flag: str, value: object, legal: str) -> None:
    """Raise UserError unless the value of a flag is legal."""
    if not holds:
        raise UserError(f"--{flag} ({value}) must be {legal}")


def warn(messages: Sequence[str]) -> None:
    """Say warnings, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        for message in messages:
            say(redact(f"moetrain: warning: {message}"))
