"""Where `benchmarks/collectives.py` measures."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))


@pytest.fixture(scope="module")
def bandwidth() -> ModuleType:
    """By its path: the tests have a module of that name, too."""
    spec = importlib.util.spec_from_file_location("bandwidth", BENCHMARKS / "collectives.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("gpus", "is_started", "device", "ranks"),
    [(0, False, "cpu", 2), (1, False, "cpu", 2), (4, False, "cuda", 4), (1, True, "cuda", 2)],
)
def test_several_gpus_are_measured_and_otherwise_cpus(
    bandwidth: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpus: int,
    is_started: bool,
    device: str,
    ranks: int,
) -> None:
    """Ranks that a launcher has started have a GPU each, if it sees any."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(sys, "argv", ["collectives.py"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if is_started:
        monkeypatch.setenv("WORLD_SIZE", "2")
    options = bandwidth.arguments()
    assert (options.device, options.ranks) == (device, ranks)
    is_left_alone = gpus == 1 and not is_started
    assert ("One GPU is here" in capsys.readouterr().out) == is_left_alone


def test_ranks_that_are_started_measure_what_was_chosen(
    bandwidth: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["collectives.py", "--rounds", "3"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    commands = list[list[str]]()

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert bandwidth.start_ranks(bandwidth.arguments()) == 3
    (command,) = commands
    monkeypatch.setattr(sys, "argv", command[command.index("collectives.py") :])
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = bandwidth.arguments()
    assert (options.device, options.ranks, options.rounds) == ("cpu", 2, 3)


def test_a_single_gpu_that_is_asked_for_is_refused(
    bandwidth: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["collectives.py", "--device", "cuda"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as refused:
        bandwidth.arguments()
    assert refused.value.code == 2
    assert "rows travel between GPUs, and one is here" in capsys.readouterr().err
