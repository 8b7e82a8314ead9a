"""What every result is kept with: the command, the machine, the versions, the date."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]


def setting() -> dict[str, Any]:
    """The command as it was given, and what it ran on."""
    return {
        "command": " ".join(["python", str(Path(sys.argv[0])), *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "beside it": ", ".join(versions("deepspeed", "transformers")),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor("model name") or platform.processor() or platform.machine(),
        "instructions": _instructions(),
        "cores": len(os.sched_getaffinity(0)),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.device_count() else {}),
    }


def write(name: str, data: dict[str, Any], text: str, folder: Path = RESULTS) -> None:
    """Write FOLDER/NAME.json (`data` beside its setting) and FOLDER/NAME.md (`text` above it)."""
    kept = setting()
    (folder / f"{name}.json").write_text(json.dumps({"setting": kept, **data}, indent=1) + "\n")
    lines = [f"- {key}: `{value}`" for key, value in kept.items()]
    (folder / f"{name}.md").write_text("\n".join([text, "", "## Setting", "", *lines]) + "\n")


def versions(*names: str, folder: Path | None = None) -> list[str]:
    """Of packages, those that are installed, or that a folder holds: name and version."""
    path = [str(folder)] if folder else sys.path
    found = {one.name.lower(): one.version for one in distributions(path=path)}
    return [f"{name} {found[name]}" for name in names if name in found]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def marked(text: str, is_short: bool) -> str:
    """In bold where it falls short of a target."""
    return f"**{text}**" if is_short else text


def pyplot() -> Any:
    """matplotlib's, drawing without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _commit() -> str:
    """The commit that ran, with a plus where files other than results had changed since."""
    git = ("git", "-C", str(ROOT))
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    others = [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"]
    changed = subprocess.run(others, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _instructions() -> str:
    """The widest for products that the processor has, by its own name for them."""
    known, flags = ("amx_bf16", "avx512_bf16", "avx512f", "avx2"), _processor("flags").split()
    return next((name for name in known if name in flags), "")


def _processor(key: str) -> str:
    """What the kernel says of the first core; nothing where it says that elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    found = [line.partition(":")[2] for line in lines if line.startswith(key)]
    return found[0].strip() if found else ""
