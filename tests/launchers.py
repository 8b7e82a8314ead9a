"""Starting the scripts of launch/, with programs of a cluster that note what is asked of them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]

OURS = {
    "VENV", "PYTHON", "EXTRA", "NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
    "HOSTFILE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "RANK",
    "WORLD_SIZE", "LOCAL_RANK",
}  # fmt: skip
"""Variables that change what a launcher does."""


def environment(**variables: str) -> dict[str, str]:
    """This process's, with nothing in it that is a launcher's, and the interpreter of the tests."""
    outer = {
        name: value
        for name, value in os.environ.items()
        if name not in OURS and not name.startswith(("SLURM_", "PET_", "SKYPILOT_"))
    }
    return {**outer, "VENV": sys.prefix, "PYTHONPATH": str(ROOT), **variables}


def run(
    *command: str | Path, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command, its scripts in the environment that runs the tests."""
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


NOTE = (
    "import json, os, sys; path, *arguments = sys.argv[1:]; "
    "print(json.dumps([arguments, dict(os.environ)]), file=open(path, 'a'))"
)


class Call(NamedTuple):
    """One start of a stub."""

    arguments: list[str]
    environ: dict[str, str]


class Stubs(NamedTuple):
    """Programs in a folder for PATH."""

    folder: Path

    def add(self, name: str, script: str = "") -> None:
        """A program that notes its call and then is `script`, in bash."""
        path = self.folder / name
        note = f"{shlex.quote(sys.executable)} -S -c {shlex.quote(NOTE)} {path}.calls"
        path.write_text(f'#!/usr/bin/env bash\n{note} "$@"\n{script}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[Call]:
        """How it was called, in order."""
        path = self.folder / f"{name}.calls"
        lines: list[Any] = [json.loads(line) for line in path.read_text().splitlines()]
        return [Call(arguments, environ) for arguments, environ in lines]

    @property
    def path(self) -> str:
        """A PATH that finds them first."""
        return f"{self.folder}:{os.environ['PATH']}"
