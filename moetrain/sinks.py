"""metrics.jsonl: one JSON object a line, whole after every step, continued by a resumed run."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

METRICS_FILE = "metrics.jsonl"

_log = logging.getLogger(__name__)


@final
class MetricsLog:
    """Appends lines to RUN/metrics.jsonl, each written out at once.

    A resumed run takes up the file after `resume_step`: later lines and a line torn by a kill are
    dropped, and with `owes_evaluation` an evaluation of that step, which is made again.
    `resume_step` 0 starts an empty file and keeps the lines of an earlier run of the name in
    metrics.jsonl.old. NaN and infinity are written as null. What a full disk does not take is a
    warning, and is written once there is room.
    """

    def __init__(self, run_dir: Path, resume_step: int, owes_evaluation: bool = False) -> None:
        path = run_dir / METRICS_FILE
        run_dir.mkdir(parents=True, exist_ok=True)
        if path.exists() and resume_step:
            _truncate(path, resume_step, owes_evaluation)
        elif path.exists():
            path.replace(path.with_name(f"{METRICS_FILE}.old"))
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line."""
        had_room = not self._waiting
        self._waiting += f"{encode(line)}\n".encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if had_room:
                _log.warning("%s waits for room: %s", self._file.name, error.strerror)

    def close(self) -> None:
        """Close the file."""
        if self._waiting:
            _log.warning("%s has lost its last lines: there was no room", self._file.name)
        self._file.close()


def encode(line: Mapping[str, Any]) -> str:
    """One line of valid JSON; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(line), allow_nan=False)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every readable line of RUN/metrics.jsonl, in order, also while the run goes on.

    Raises FileNotFoundError when the run has no metrics.
    """
    with (run_dir / METRICS_FILE).open(encoding="utf-8", errors="replace") as file:
        return [line for text in file if (line := _decode(text)) is not None]


def _truncate(path: Path, last_step: int, owes_evaluation: bool) -> None:
    """Drop the lines that are written again, and the unreadable ones; all or nothing on disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(_lines_up_to(path, last_step, owes_evaluation))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _lines_up_to(path: Path, last_step: int, owes_evaluation: bool) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, start=1):
            line = _decode(text)
            if line is None:
                _log.warning("dropped line %d of %s: cut short or damaged", number, path)
            elif line["step"] < last_step or (
                line["step"] == last_step and not (owes_evaluation and "eval_loss" in line)
            ):
                yield text


def _decode(text: str) -> dict[str, Any] | None:
    """A whole line, or None for a torn or damaged one."""
    if not text.endswith("\n"):
        return None
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
