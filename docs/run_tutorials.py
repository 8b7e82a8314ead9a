"""Run the tutorials as they stand: python docs/run_tutorials.py [PAGE ...]

Each page has a folder of its own, in which launch/ and benchmarks/ are those of the repository. Its
blocks are taken in order. One that begins with a comment that is a file's name is written to that
file; `sh` is run, and must succeed; the lines of `text` must be among those that the commands
before it printed, in this order, but for numbers. Blocks of `bash` are for another machine or a
network, and those of `console` show what every machine prints in its own way: neither is looked at.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
LIMIT_S = 300
"""How long one block may take."""

TELLING_MORE = ("CI", "BUILD_NUMBER", "COLUMNS", "FORCE_COLOR", "PY_COLORS")
"""Variables by which programs print otherwise than to a reader."""

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w-]+\.\w+)\n")


def main(names: Sequence[str]) -> None:
    """Run the pages of these names, or all; raises SystemExit where one is not as it says."""
    pages = [TUTORIALS / name for name in names] or sorted(TUTORIALS.glob("*.md"))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        environment = _environment(home)
        for page in pages:
            started = time.monotonic()
            run(page, home / page.stem, environment)
            print(f"{page.name}: {time.monotonic() - started:.0f} s", flush=True)


def run(page: Path, folder: Path, environment: dict[str, str]) -> None:
    """Do in a folder what a page says; raises SystemExit where something else comes of it."""
    folder.mkdir()
    for name in ("launch", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    output = ""
    for language, body in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if name := _FILE.match(body):
            (folder / name[1]).write_text(body, encoding="utf-8")
        elif language == "sh":
            output = _output_of(body, folder, environment)
        elif language == "text" and (missing := _missing(body, output)):
            raise SystemExit(f"{page}: not printed: {missing}\n--- but:\n{output}")


def _environment(folder: Path) -> dict[str, str]:
    """That of a reader who has moetrain on the path, no GPU, and nothing prepared."""
    kept = {name: value for name, value in os.environ.items() if name not in TELLING_MORE}
    return kept | {
        "MASTER_PORT": str(_free_port()),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "VENV": sys.prefix,
        "CUDA_VISIBLE_DEVICES": "",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _output_of(commands: str, folder: Path, environment: dict[str, str]) -> str:
    """What commands print, both ways; raises SystemExit where one fails or takes too long."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = f"nothing after {LIMIT_S} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what they have left running, too
        file.seek(0)
        printed = file.read()
    if code:
        raise SystemExit(f"{commands}--- ended with {code}:\n{printed}")
    return printed.replace(str(folder), "…")


def _missing(shown: str, output: str) -> str:
    """The first line shown that was not printed after those before it."""
    printed = iter([_without_numbers(line) for line in output.splitlines()])
    for line in shown.splitlines():
        if line.strip() != "..." and _without_numbers(line) not in printed:
            return line
    return ""


def _without_numbers(line: str) -> str:
    return re.sub(r"\s*(?:-|fp|bf)?\d[\d.,:]*(?:[kMG]\b|\s*%)?\s*", " # ", line).strip()


if __name__ == "__main__":
    main(sys.argv[1:])
