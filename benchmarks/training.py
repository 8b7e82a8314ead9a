"""Runs that a benchmark trains as a user does, by launch/train.sh."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import record
import yaml

from moetrain.sinks import read_metrics


def train(
    folder: Path,
    name: str,
    config: Path | Mapping[str, Any],
    flags: Mapping[str, object] | None = None,
    ranks: int = 1,
) -> list[dict[str, Any]]:
    """Train into FOLDER/NAME, on GPUs if there are as many as ranks; the lines of its metrics.

    A configuration that is no file yet becomes FOLDER/NAME.yaml. Raises SystemExit with the run's
    exit code where that is not 0.
    """
    if isinstance(config, Mapping):
        text, config = yaml.safe_dump(dict(config)), folder / f"{name}.yaml"
        config.write_text(text)
    command = [str(record.ROOT / "launch" / "train.sh"), str(config)]
    for flag, value in {"out": folder, "name": name, **(flags or {})}.items():
        command += [f"--{flag}", str(value)]
    environment = {"VENV": sys.prefix, **os.environ, "NPROC": str(ranks)}
    if code := subprocess.run(command, stdout=sys.stderr, env=environment).returncode:
        raise SystemExit(code)
    return read_metrics(folder / name)
