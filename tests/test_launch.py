"""The scripts that a user starts, and the launcher under them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from launchers import ROOT, run

SOURCED = {ROOT / "launch/setup.sh", ROOT / "launch/common.sh"}
SCRIPTS = sorted(
    {ROOT / ".ci/run", *ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch")} - SOURCED
)
LAUNCHERS = [ROOT / "launch" / name for name in ("train.sh", "deepspeed.sh", "slurm.sbatch")]


def test_every_script_can_be_run_and_stops_at_the_first_failure() -> None:
    assert set(LAUNCHERS) < set(SCRIPTS)
    for path in SCRIPTS:
        lines = path.read_text().splitlines()
        assert os.access(path, os.X_OK), path
        assert lines[0] == "#!/usr/bin/env bash", path
        assert lines[1].startswith("# "), f"{path} does not say what it does"
        assert "set -euo pipefail" in lines, path


def test_scripts_pass_shellcheck() -> None:
    # The wheel of the test extra puts it beside the interpreter.
    done = run(Path(sys.prefix, "bin/shellcheck"), "-x", *SOURCED, *SCRIPTS)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["--train.steps", "3", "a.yaml"]])
def test_a_launcher_wants_a_configuration_first(script: Path, arguments: list[str]) -> None:
    done = run("bash", script, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("CONFIG must come first; usage: ")
    assert f"launch/{script.name} [--dry-run] CONFIG" in line


# ---- the environment -----------------------------------------------------------------------------


class Clone(NamedTuple):
    """The files that the scripts need, with interpreters that note what is asked of them."""

    root: Path
    python: Path
    calls_file: Path

    def run(self, script: str, **environ: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        seen = {"CUDA_VISIBLE_DEVICES": "all", **environ}  # whatever this process may see
        return run("bash", "-c", script, cwd=self.root, **seen)

    def venv(self) -> str:
        return str(self.python.parents[1])

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    def kinds(self) -> list[str]:
        """The first words of each call."""
        return [" ".join(call.split()[:2]) for call in self.calls()]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    root, python, calls = tmp_path / "clone", tmp_path / "venv/bin/python", tmp_path / "calls"
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copy(ROOT / "pyproject.toml", root)
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/usr/bin/env bash
        echo "$*" >>"{calls}"
        [[ -z "${{FAIL:-}}" || "$*" != $FAIL ]] || {{ echo "no: $*" >&2; exit 3; }}
        case "$*" in
            "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
            *device_count*) echo "${{GPUS:-0}}" ;;
        esac
        """
    )
    python.chmod(0o755)
    return Clone(root, python, calls)


SETUP = "set -euo pipefail; source launch/setup.sh; command -v python"
INSTALL = ["-c import", "-m venv", "-m pip"]


def test_setup_installs_once_and_again_when_the_requirements_change(clone: Clone) -> None:
    environ = {"VENV": "", "PYTHON": str(clone.python)}
    done = clone.run(SETUP, **environ)
    assert done.stdout.strip() == str(clone.root / ".venv/bin/python")
    assert clone.kinds() == INSTALL
    assert clone.calls()[-1].endswith(f"-e {clone.root}[test]")
    clone.run(SETUP, **environ)
    assert clone.kinds() == []
    (clone.root / "pyproject.toml").write_text("# other requirements")
    clone.run(SETUP, **environ)
    assert clone.kinds() == INSTALL
    clone.run(SETUP, EXTRA="dev", **environ)
    assert clone.calls()[-1].endswith("[dev]")


def test_setup_repeats_an_installation_that_failed(clone: Clone) -> None:
    environ = {"VENV": "", "PYTHON": str(clone.python)}
    assert clone.run(SETUP, FAIL="-m pip*", **environ).returncode == 3
    assert clone.run(SETUP, **environ).returncode == 0
    assert clone.kinds() == INSTALL


def test_setup_refuses_an_old_interpreter(clone: Clone) -> None:
    done = clone.run(SETUP, VENV="", PYTHON=str(clone.python), FAIL="-c *version_info*")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert clone.kinds() == ["-c import"]


# ---- training ------------------------------------------------------------------------------------

SEVERAL = {"NNODES": "4", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29511"}
OF_SEVERAL = [
    *("--nnodes=4", "--node-rank=1", "--master-addr=first", "--master-port=29511"),
    "--max-restarts=0",
]
ELASTIC = {"NNODES": "1:3", "MASTER_ADDR": "first"}
OF_ELASTIC = [
    *("--nnodes=1:3", "--rdzv-backend=c10d", "--rdzv-endpoint=first:29500"),
    *("--rdzv-id=moetrain", "--max-restarts=3"),
]
AGAIN = "--max-restarts=3"


def options(call: str) -> list[str]:
    return call.split(" -m moetrain train")[0].split()[2:]


@pytest.mark.parametrize(
    ("environ", "world_size", "launch"),
    [
        ({}, 1, ["--nproc-per-node=1", AGAIN]),
        ({"NPROC": "2"}, 2, ["--nproc-per-node=2", AGAIN]),
        ({"GPUS": "8"}, 8, ["--nproc-per-node=8", AGAIN]),
        ({"GPUS": "8", "MAX_RESTARTS": "0"}, 8, ["--nproc-per-node=8", "--max-restarts=0"]),
        ({"GPUS": "2", **SEVERAL}, 8, ["--nproc-per-node=2", *OF_SEVERAL]),
        (
            {"GPUS": "2", **SEVERAL, "NODE_RANK": "", "SLURM_NODEID": "1"},
            8,
            ["--nproc-per-node=2", *OF_SEVERAL],
        ),
    ],
)
def test_train_checks_for_the_ranks_that_it_launches(
    clone: Clone, environ: dict[str, str], world_size: int, launch: list[str]
) -> None:
    done = clone.run("launch/train.sh a.yaml --train.steps 3", VENV=clone.venv(), **environ)
    assert done.returncode == 0, done.stderr
    check, train = clone.calls()[1:]
    assert check == f"-m moetrain check a.yaml --train.steps 3 --world-size {world_size}"
    assert options(train) == launch
    assert train.endswith(" -m moetrain train a.yaml --train.steps 3")


def test_every_number_of_nodes_that_may_be_left_is_checked(clone: Clone) -> None:
    done = clone.run("launch/train.sh a.yaml", VENV=clone.venv(), GPUS="2", **ELASTIC)
    assert done.returncode == 0, done.stderr
    *checks, train = clone.calls()[1:]
    assert [call.split()[-1] for call in checks] == ["2", "4", "6"]
    assert options(train) == ["--nproc-per-node=2", *OF_ELASTIC]


def test_gpus_that_are_hidden_do_not_count(clone: Clone) -> None:
    done = clone.run("launch/train.sh a.yaml", VENV=clone.venv(), GPUS="8", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0
    assert options(clone.calls()[-1]) == ["--nproc-per-node=1", AGAIN]


def test_more_ranks_than_gpus_train_on_the_cpu(clone: Clone) -> None:
    done = clone.run("launch/train.sh a.yaml", VENV=clone.venv(), GPUS="1", NPROC="2")
    assert done.returncode == 0
    assert done.stderr == "NPROC (2) is more than the GPUs here (1): training on the CPU.\n"
    assert options(clone.calls()[-1]) == ["--nproc-per-node=2", AGAIN]


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR must be set when NNODES is above 1"),
        ({**SEVERAL, "NODE_RANK": ""}, "NODE_RANK (not set) must be one of 0 to 3"),
        ({**SEVERAL, "NODE_RANK": "4"}, "NODE_RANK (4) must be one of 0 to 3"),
        ({**SEVERAL, "NODE_RANK": "first"}, "NODE_RANK (first) must be one of 0 to 3"),
        ({"NNODES": "0"}, "NNODES (0) must be a whole number, 1 or more"),
        ({"NNODES": "1:two"}, "NNODES (two) must be a whole number, 1 or more"),
        ({"NNODES": "3:2"}, "NNODES (3:2) must be MIN:MAX with MIN not above MAX"),
        ({"NNODES": "1:2"}, "MASTER_ADDR must be set when NNODES is above 1"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS (-1) must be a whole number, 0 or more"),
        ({"NPROC": "two"}, "NPROC (two) must be a whole number, 1 or more"),
    ],
)
def test_a_wrong_variable_is_named_before_anything_runs(
    clone: Clone, environ: dict[str, str], message: str
) -> None:
    done = clone.run("launch/train.sh a.yaml", VENV=clone.venv(), **environ)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
    assert clone.calls() == []


@pytest.mark.parametrize(
    ("environ", "command"),
    [
        (
            {"NPROC": "2"},
            f"python -m moetrain.torchrun --nproc-per-node=2 {AGAIN}",
        ),
        (
            {"NPROC": "2", "GPUS": "1"},
            f"CUDA_VISIBLE_DEVICES= python -m moetrain.torchrun --nproc-per-node=2 {AGAIN}",
        ),
        (
            {"GPUS": "8", **SEVERAL},
            f"python -m moetrain.torchrun --nproc-per-node=8 {' '.join(OF_SEVERAL)}",
        ),
    ],
)
def test_a_dry_run_prints_the_command_and_only_checks(
    clone: Clone, environ: dict[str, str], command: str
) -> None:
    script = "launch/train.sh --dry-run a.yaml --name 'a b'"
    done = clone.run(script, VENV=clone.venv(), OMP_NUM_THREADS="3", **environ)
    assert done.returncode == 0, done.stderr
    expected = f"env OMP_NUM_THREADS=3 {command} -m moetrain train a.yaml --name a\\ b\n"
    assert done.stdout == expected
    assert clone.kinds() == ["-c import", "-m moetrain"]
    assert "moetrain check" in clone.calls()[-1]


def test_a_mistake_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    done = run(
        ROOT / "launch/train.sh",
        ROOT / "configs/quickstart.yaml",
        *("--parallel.ep", "3"),
        cwd=tmp_path,
        NPROC="3",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "moe.experts (8) must be divisible by parallel.ep (3)" in line


@pytest.mark.parametrize("stage", ["check", "train", "eval", "generate"])
def test_quickstart_fails_with_its_first_failing_stage(clone: Clone, stage: str) -> None:
    script = f"cd / && {clone.root}/launch/quickstart.sh --train.steps 3"
    done = clone.run(script, VENV=clone.venv(), FAIL=f"*moetrain {stage}*")
    assert done.returncode == 3
    assert f"moetrain {stage}" in clone.calls()[-1]


def test_quickstart_trains_on_two_ranks_with_the_experts_spread(clone: Clone) -> None:
    done = clone.run("launch/quickstart.sh --train.steps 3", VENV=clone.venv())
    assert done.returncode == 0, done.stderr
    train = next(call for call in clone.calls() if "moetrain train" in call)
    assert options(train) == ["--nproc-per-node=2", AGAIN]
    assert train.endswith(
        "configs/quickstart.yaml --train.steps 3 --name quickstart --out runs --parallel.ep 2"
    )
    assert str(clone.root / "runs/quickstart") in done.stdout


# ---- the launcher --------------------------------------------------------------------------------

LISTENING = """
import os, re, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
inodes = set()
for pid in (os.getpid(), os.getppid()):
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            inodes |= set(re.findall(r"socket:.(\\d+)", os.readlink(f"/proc/{pid}/fd/{fd}")))
        except FileNotFoundError:
            pass
found = []
for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    for line in open(table).readlines()[1:] if os.path.exists(table) else []:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            found.append(fields[1].split(":")[0])
dist.barrier()
print(f"rank {dist.get_rank()} total {int(total)} listens {sorted(set(found))}\\n", end="")
dist.destroy_process_group()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the sockets of a process from /proc")
def test_a_single_node_listens_on_loopback_alone_and_on_a_port_that_is_free(tmp_path: Path) -> None:
    """Whatever address and port the environment asks for, here one that is taken."""
    script = tmp_path / "listening.py"
    script.write_text(LISTENING)
    launcher = (sys.executable, "-m", "moetrain.torchrun", "--nproc-per-node=2")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environ = {"MASTER_ADDR": "0.0.0.0", "MASTER_PORT": str(taken.getsockname()[1])}
        done = run(*launcher, script, OMP_NUM_THREADS="1", **environ)
    assert done.returncode == 0, done.stderr
    loopback = "0100007F"
    lines = [f"rank {rank} total 2 listens ['{loopback}']" for rank in range(2)]
    assert sorted(done.stdout.split("\n")[:-1]) == lines
