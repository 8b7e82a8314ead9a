"""What every result is kept with: the command, the machine, the versions, the date."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch

from moetrain.plots.panels import STYLE

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]


def setting(device: str | None = None) -> dict[str, Any]:
    """The command as it was given, and what it ran on; `device` is cpu where no GPU took part."""
    on_gpu = device != "cpu" and torch.cuda.device_count() > 0
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "beside it": ", ".join(versions("deepspeed", "transformers")),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor("model name") or platform.processor() or platform.machine(),
        "instructions": _instructions(),
        "cores": len(os.sched_getaffinity(0)),
        **({"gpu": torch.cuda.get_device_name()} if on_gpu else {}),
    }


def name_on(device: str, name: str) -> str:
    """What a result is called: a GPU's lie beside those of CPUs."""
    return f"{name}-cuda" if device == "cuda" else name


def write(
    name: str,
    data: dict[str, Any],
    text: str,
    folder: Path = RESULTS,
    device: str | None = None,
) -> str:
    """Write FOLDER/NAME.json (`data` beside its setting) and FOLDER/NAME.md (`text` above it);
    returns the latter. `device` is what was chosen, where one could choose."""
    kept = setting(device)
    (folder / f"{name}.json").write_text(json.dumps({"setting": kept, **data}, indent=1) + "\n")
    lines = [f"- {key}: `{value}`" for key, value in kept.items()]
    page = "\n".join([text, "", "## Setting", "", *lines]) + "\n"
    (folder / f"{name}.md").write_text(page)
    return page


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
    """matplotlib's, drawing without a display and in the style of a run's pictures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def _commit() -> str:
    """The commit that ran, with a plus where files other than results had changed since."""
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return _git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def _git(*words: str) -> str:
    """What git says of the repository; nothing where there is none, or no git, as in the image."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


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
