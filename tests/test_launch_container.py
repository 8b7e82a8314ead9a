"""The image: what its file says, and its health check, run here as it would run there."""

from __future__ import annotations

import fnmatch
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from launchers import ROOT, Stubs, run

from moetrain.sinks import read_metrics

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """Every instruction and what follows it, lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line]


def of_kind(kind: str) -> list[str]:
    return [rest for name, rest in instructions() if name == kind]


def health_check() -> list[str]:
    (check,) = of_kind("HEALTHCHECK")
    return json.loads(check.partition(" CMD ")[2])


def test_the_dockerfile_passes_hadolint() -> None:
    # The wheel of the test extra puts it beside the interpreter.
    done = run(Path(sys.prefix, "bin/hadolint"), "--no-color", ROOT / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_the_base_can_be_chosen_and_is_pinned() -> None:
    assert of_kind("FROM") == ["${BASE}"]
    usage = re.findall(r"BASE=(\S+)", DOCKERFILE)
    assert any(base.startswith("nvidia/cuda:") for base in usage)
    for base in usage:
        assert re.fullmatch(r"[\w/]+:\d+\.\d+[\w.-]*", base), base


def test_the_image_runs_as_a_user_without_privileges() -> None:
    assert [name for name, _ in instructions()].index("USER") > max(
        place for place, (name, _) in enumerate(instructions()) if name == "RUN"
    )
    (user,) = of_kind("USER")
    assert int(user) > 0  # a number, which Kubernetes can tell from root
    assert f"useradd --uid {user} " in DOCKERFILE


def test_apt_leaves_no_lists_in_a_layer() -> None:
    layers = [layer for layer in of_kind("RUN") if "apt-get" in layer]
    assert layers
    for layer in layers:
        assert "apt-get update" in layer
        assert "rm -rf /var/lib/apt/lists/*" in layer


def test_what_is_copied_is_there_and_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "what is not named must stay out"
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = {source for line in of_kind("COPY") for source in line.split()[:-1]}
    assert copied == sent
    for name in copied:
        assert (ROOT / name).exists(), name
        assert not any(fnmatch.fnmatch(name, line) for line in lines if line not in "*#")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The part of the image that the health check uses, its results kept apart."""
    for name in ("README.md", "launch", "moetrain", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    config = yaml.safe_load((ROOT / "launch/health.yaml").read_text())
    config["out"] = str(tmp_path / "out")
    config["data"]["cache"] = str(tmp_path / "cache")
    (tmp_path / "launch").unlink()
    (tmp_path / "launch").mkdir()
    for path in (ROOT / "launch").glob("*.sh"):
        (tmp_path / "launch" / path.name).symlink_to(path)
    (tmp_path / "launch/health.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_the_health_check_trains_a_step_with_experts_on_two_ranks(image: Path) -> None:
    assert "launch/health.yaml" in health_check()
    done = run(*health_check(), cwd=image)
    assert done.returncode == 0, done.stderr
    (line,) = read_metrics(image / "out/health")
    (layer,) = line["layers"]
    assert line["step"] == 1
    assert line["bad_steps"] == 0
    assert line["grad_norm"] > 0
    assert len(layer["outcomes_by_rank"]) == 2
    assert layer["kept"] > 0
    resolved = yaml.safe_load((image / "out/health/config.yaml").read_text())
    assert resolved["parallel"]["ep"] == 2


RANK_DIES = """
import os
if os.environ.get("RANK") == "1":
    os._exit(9)
"""


def test_the_health_check_fails_with_a_rank(image: Path) -> None:
    (image / "fault").mkdir()
    (image / "fault/sitecustomize.py").write_text(RANK_DIES)
    python = Stubs(image / "bin")
    python.folder.mkdir()
    python.add("python", f'[[ "$2 $3" == "moetrain check" ]] || exec {sys.executable} "$@"')
    done = run(*health_check(), cwd=image, VENV=str(image), PYTHONPATH=f"{image / 'fault'}:{ROOT}")
    assert done.returncode == 1
    assert re.search(r"^moetrain: error: rank 1 on \S+: exit code 9$", done.stderr, re.MULTILINE)
