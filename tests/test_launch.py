"""The scripts that a user starts, and the launcher under them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCED = {"setup.sh"}
SCRIPTS = sorted(
    path
    for path in [*ROOT.glob("launch/**/*.sh"), ROOT / ".ci/run"]
    if path.name not in SOURCED
)


def run(
    *command: str | Path, cwd: Path = ROOT, timeout: float = 120, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in the environment that runs the tests, where moetrain may be uninstalled."""
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "VENV": sys.prefix, "PYTHONPATH": str(ROOT), **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_every_script_can_be_run_and_stops_at_the_first_failure() -> None:
    assert len(SCRIPTS) >= 4
    for path in SCRIPTS:
        lines = path.read_text().splitlines()
        assert os.access(path, os.X_OK), path
        assert lines[0] == "#!/usr/bin/env bash", path
        assert lines[1].startswith("# "), f"{path} does not say what it does"
        assert "set -euo pipefail" in lines, path


def test_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.fail("shellcheck is not installed: pip install -e '.[dev]'")
    done = run(shellcheck, "-x", *SCRIPTS, *ROOT.glob("launch/setup.sh"))
    assert done.returncode == 0, done.stdout


# ---- the environment -----------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A bare clone's worth of files, and a `python3` that notes what is asked of it."""
    shutil.copytree(ROOT / "launch", tmp_path / "clone/launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "clone")
    python = tmp_path / "python3"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$@" >>"{tmp_path}/calls"\n'
        '[[ "$1 $2" != "-m venv" ]] || { mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; }\n'
        f'[[ "$2" != "${{FAIL:-}}" ]] && [[ "$1" == "-m" ]] || exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    return tmp_path / "clone"
