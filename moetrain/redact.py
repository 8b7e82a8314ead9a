"""Secrets taken out of what is written down: settings that are saved, messages, wandb's log.

A secret is the value of an environment variable whose name says so, a token of a known shape, what
stands before the @ of a URL's host, or a parameter of a URL whose name says so. Settings keep
theirs in memory. Standard library alone: the command line needs this before anything heavy.
"""

from __future__ import annotations

import json
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType
from urllib.parse import quote

from moetrain.errors import UserError
from moetrain.saying import say

MARK = "***"
MIN_LENGTH = 8
"""Characters of a value, or of a line of it, from which on it is a secret: below are words."""

_NAMES = "KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL"
_SECRET_VARIABLE = re.compile(
    rf"(?i)(?!.*_(PATH|FILE|DIR)$)(.*({_NAMES})S?\d*|(.*_)?PASS|.+_PWD|.*CONNECTION_STRING)(_|$)"
)
_SHAPES = [
    re.compile(pattern)
    for pattern in (
        r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20,})",  # Hugging Face
        r"(?<![A-Za-z0-9])(sk-(?=[\w-]*\d)[\w-]{20,})",  # OpenAI, Anthropic and others
        r"(?<![A-Za-z0-9])(gh[opsur]_[A-Za-z0-9]{36,}|github_pat_\w{22,})",  # GitHub
        r"(?<![A-Za-z0-9])(glpat-[\w-]{20,})",  # GitLab
        r"(?<![A-Za-z0-9])(xox[abeoprs]-[\w-]{10,})",  # Slack
        r"(?<![A-Za-z0-9])(AIza[\w-]{35})",  # Google
        r"(?<![A-Za-z0-9])((?:AKIA|ASIA)[A-Z0-9]{16})(?![A-Z0-9])",  # AWS
        r"://([^\s/?#]+)@",
        r"(?i)\bbearer\s+([\w.~+/=-]{8,})",
        rf"(?i)[?&][\w.-]*(?:{_NAMES}|SIGNATURE|(?<=[?&])SIG(?==))[\w.-]*=([^\s&#'\"]+)",
    )
]


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with MARK in place of every secret; text without any comes back as it is."""
    patterns = [*_SHAPES, *map(_literal, _secrets(environ))]
    spans = sorted(match.span(1) for pattern in patterns for match in pattern.finditer(text))
    kept, end = [], 0
    for start, stop in spans:
        if stop <= end:
            continue
        # Secrets that overlap, or follow each other at once, leave nothing between them.
        if start > end or not kept:
            kept += [text[end:start], MARK]
        end = stop
    return "".join([*kept, text[end:]])


def require_whole(setting: str, value: str) -> None:
    """Raise UserError where a value is needed that was redacted when it was saved."""
    if MARK in value:
        raise UserError(
            f"{setting} ({value}) was redacted when it was saved, because it holds a secret; "
            "give the value again, or better one that needs no secret"
        )


def show_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What `sys.excepthook` is to be: the usual traceback, redacted."""
    say(redact("".join(traceback.format_exception(kind, error, trace)).rstrip()))


def _secrets(environ: Mapping[str, str]) -> Iterator[str]:
    """The values of secret variables: whole, line by line, as in quotes, as in URLs."""
    for name, value in environ.items():
        if _SECRET_VARIABLE.match(name):
            spelled = {value, repr(value)[1:-1], json.dumps(value)[1:-1], quote(value, safe="")}
            yield from (s for s in {*spelled, *value.splitlines()} if len(s) >= MIN_LENGTH)


def _literal(secret: str) -> re.Pattern[str]:
    """Finds a text everywhere, where it overlaps with itself, too."""
    return re.compile(f"(?=({re.escape(secret)}))")
