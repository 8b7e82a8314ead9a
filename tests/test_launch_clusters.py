"""The launchers of clusters: what they ask Slurm, DeepSpeed, Kubernetes and SkyPilot for."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from launchers import ROOT, Stubs, environment, run
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from moetrain import cli, settings
from moetrain.commands.runs import Train
from moetrain.constraints import check_world

CONFIG = "configs/quickstart.yaml"


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    """Nothing yet."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return Stubs(folder)


def check(launch: list[str], world_size: int) -> None:
    """The words after launch/train.sh are a run that `moetrain check` accepts."""
    command = cli.parse(["train", *launch])
    assert isinstance(command, Train)
    check_world(settings.resolve(ROOT / command.config, command.flags), world_size)


# ---- Slurm ---------------------------------------------------------------------------------------

JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_JOB_NODELIST": "node[07-09]",
}
STEP = (
    "--nodes={} --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 "
    "env NNODES={} MASTER_ADDR={} MASTER_PORT={} launch/train.sh"
)


@pytest.fixture
def slurm(stubs: Stubs) -> Stubs:
    """srun that trains for as long as it is let, and the controller, which can signal it.

    Like the real ones: srun kills its task when it is signalled itself, `scancel --signal` signals
    the task, and `scontrol show job` tells of preemption.
    """
    stubs.add("scontrol", SCONTROL)
    (stubs.folder / "job").write_text("PreemptTime=None")
    stubs.add("scancel", 'kill -USR1 "$(cat "${0%/*}/task")"')
    stubs.add("srun", training("echo saved; exit 75"))
    return stubs


SCONTROL = """
case "$1 $2" in
    "show hostnames") printf "node%s\\n" 07 08 09 ;;
    "show job") echo "JobId=$3 PreemptEligibleTime=2030-01-01T00:00:00 $(cat "${0%/*}/job")" ;;
esac
"""


def training(when_told_to_end: str) -> str:
    """What srun starts: a task that runs for a while, and what that does on a signal."""
    task = (
        f"trap '{when_told_to_end}' TERM USR1; touch ready; for _ in {{1..200}}; do sleep 0.1; done"
    )
    return f"""
cd "${{0%/*}}"
bash -c {shlex.quote(task)} & echo $! >task
trap 'kill -KILL $(cat task); exit 137' TERM
wait $(cat task)
"""


def submitted(stubs: Stubs, tmp_path: Path) -> subprocess.Popen[str]:
    """The job as Slurm starts it: a copy of the script elsewhere, in the folder it came from."""
    script = tmp_path / "slurm_script"
    script.write_text((ROOT / "launch/slurm.sbatch").read_text())
    script.chmod(0o755)
    return subprocess.Popen(
        [str(script), CONFIG, "--name", "a b"],
        cwd=ROOT,
        env=environment(PATH=stubs.path, **JOB),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def started(stubs: Stubs, job: subprocess.Popen[str]) -> None:
    """Wait until srun can be told to end."""
    deadline = time.monotonic() + 20
    while not (stubs.folder / "ready").exists():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_starts_one_agent_on_each_node(slurm: Stubs, tmp_path: Path) -> None:
    slurm.add("srun")
    job = submitted(slurm, tmp_path)
    assert job.communicate(timeout=20)[0] == ""
    assert job.returncode == 0
    (call,) = slurm.calls("srun")
    step = STEP.format(3, 3, "node07", 20000 + 123456 % 10000).split()
    assert call.arguments == [*step, CONFIG, "--name", "a b"]
    assert [call.arguments for call in slurm.calls("scontrol")] == [
        ["show", "hostnames", "node[07-09]"]
    ]


def verbs(slurm: Stubs) -> list[str]:
    """What the controller was asked to do."""
    return [call.arguments[0] for call in slurm.calls("scontrol")]


def test_a_job_that_is_warned_ends_its_run_and_goes_back_to_the_queue(
    slurm: Stubs, tmp_path: Path
) -> None:
    job = submitted(slurm, tmp_path)
    started(slurm, job)
    job.send_signal(signal.SIGUSR1)
    assert job.communicate(timeout=20)[0] == "saved\n"
    assert job.returncode == 0
    (cancel,) = slurm.calls("scancel")
    assert cancel.arguments == ["--signal=USR1", "--quiet", "123456"]
    assert slurm.calls("scontrol")[-1].arguments == ["requeue", "123456"]


@pytest.mark.parametrize("hears", ["the script", "the run alone"])
def test_a_preempted_job_goes_back_to_the_queue(slurm: Stubs, tmp_path: Path, hears: str) -> None:
    job = submitted(slurm, tmp_path)
    started(slurm, job)
    (slurm.folder / "job").write_text("PreemptTime=2030-01-01T00:00:10")
    if hears == "the script":
        job.send_signal(signal.SIGTERM)
    else:
        os.kill(int((slurm.folder / "task").read_text()), signal.SIGTERM)
    assert job.communicate(timeout=20)[0] == "saved\n"
    assert slurm.calls("scontrol")[-1].arguments == ["requeue", "123456"]


def test_a_cancelled_job_ends_its_run_and_stays_away(slurm: Stubs, tmp_path: Path) -> None:
    job = submitted(slurm, tmp_path)
    started(slurm, job)
    job.send_signal(signal.SIGTERM)
    assert job.communicate(timeout=20)[0] == "saved\n"
    assert job.returncode == 75
    assert "requeue" not in verbs(slurm)


def test_a_second_warning_lets_the_run_save(slurm: Stubs, tmp_path: Path) -> None:
    slurm.add("srun", training("echo saving; sleep 1; echo saved; exit 75"))
    job = submitted(slurm, tmp_path)
    started(slurm, job)
    job.send_signal(signal.SIGUSR1)
    assert job.stdout is not None
    assert job.stdout.readline() == "saving\n"
    job.send_signal(signal.SIGTERM)
    assert job.communicate(timeout=20)[0] == "saved\n"
    assert len(slurm.calls("scancel")) == 1
    assert slurm.calls("scontrol")[-1].arguments == ["requeue", "123456"]


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3)])
def test_a_run_that_ends_by_itself_is_not_requeued(
    slurm: Stubs, tmp_path: Path, script: str, code: int
) -> None:
    slurm.add("srun", script)
    job = submitted(slurm, tmp_path)
    job.communicate(timeout=20)
    assert job.returncode == code
    assert "requeue" not in verbs(slurm)


def test_a_run_that_finished_when_it_was_warned_is_not_requeued(
    slurm: Stubs, tmp_path: Path
) -> None:
    slurm.add("srun", training("exit 0"))
    job = submitted(slurm, tmp_path)
    started(slurm, job)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=20)
    assert job.returncode == 0
    assert "requeue" not in verbs(slurm)


def test_slurm_is_told_to_warn_and_to_requeue() -> None:
    lines = (ROOT / "launch/slurm.sbatch").read_text().splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--requeue", "--signal=B:USR1@120", "--ntasks-per-node=1", "--open-mode=append"} <= set(
        directives
    )
    # sbatch reads no directive after the first command.
    first = next(number for number, line in enumerate(lines) if line and line[0] != "#")
    assert max(n for n, line in enumerate(lines) if line.startswith("#SBATCH")) < first


def test_slurm_outside_of_a_job(slurm: Stubs, tmp_path: Path) -> None:
    shown = run("bash", "launch/slurm.sbatch", "--dry-run", CONFIG, PATH=slurm.path)
    assert shown.stdout == f"srun {STEP.format('NODES', 'NODES', 'FIRST_NODE', 20000)} {CONFIG}\n"
    assert shown.returncode == 0
    started = run("bash", "launch/slurm.sbatch", CONFIG, PATH=slurm.path)
    assert started.returncode == 2
    assert started.stderr == (
        f"this is no Slurm job: submit it with sbatch launch/slurm.sbatch {CONFIG}\n"
    )
    elsewhere = run("bash", ROOT / "launch/slurm.sbatch", CONFIG, cwd=tmp_path)
    assert elsewhere.returncode == 2
    assert elsewhere.stderr.startswith(f"launch/ is not in {tmp_path}: submit from the root")
    assert list(slurm.folder.glob("*.calls")) == []


def test_a_dry_run_within_a_job_knows_its_nodes(slurm: Stubs) -> None:
    done = run("bash", "launch/slurm.sbatch", "--dry-run", CONFIG, PATH=slurm.path, **JOB)
    assert done.stdout == f"srun {STEP.format(3, 3, 'node07', 23456)} {CONFIG}\n"


# ---- DeepSpeed's launcher ------------------------------------------------------------------------

HOSTS = "# two hosts\nworker-0 slots=2\n\nworker-1 slots=6\n"


@pytest.fixture
def deepspeed(stubs: Stubs) -> Stubs:
    """An environment whose interpreter finds every configuration right, or wrong with FAIL."""
    stubs.add("deepspeed")
    stubs.add("python", '[[ -z "${FAIL:-}" ]] || { echo "$FAIL" >&2; exit 2; }')
    (stubs.folder.parent / "hostfile").write_text(HOSTS)
    return stubs


def deepspeed_sh(stubs: Stubs, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    folder = stubs.folder.parent
    return run(
        ROOT / "launch/deepspeed.sh", *arguments, cwd=folder, **{"VENV": str(folder), **environ}
    )


LAUNCH = (
    "--hostfile=hostfile --master_port=29500 --no_local_rank --module moetrain train "
    "a.yaml --engine.kind deepspeed"
)


def test_deepspeed_is_given_the_hosts_and_the_engine(deepspeed: Stubs) -> None:
    done = deepspeed_sh(deepspeed, "a.yaml")
    assert done.returncode == 0, done.stderr
    (checked,) = deepspeed.calls("python")
    assert checked.arguments == shlex.split(
        "-m moetrain check a.yaml --engine.kind deepspeed --world-size 8"
    )
    (call,) = deepspeed.calls("deepspeed")
    assert call.arguments == LAUNCH.split()


def test_deepspeeds_launcher_has_the_options_that_it_is_given() -> None:
    from deepspeed.launcher.runner import parse_args

    args = parse_args(LAUNCH.split())
    assert args.hostfile == "hostfile"
    assert (args.no_local_rank, args.module) == (True, True)
    assert (args.user_script, args.user_args[:2]) == ("moetrain", ["train", "a.yaml"])


def test_deepspeed_dry_run_prints_the_command(deepspeed: Stubs) -> None:
    done = deepspeed_sh(
        deepspeed, "--dry-run", "a.yaml", MASTER_ADDR="10.0.0.1", MASTER_PORT="29511"
    )
    assert done.stdout == (
        "deepspeed --hostfile=hostfile --master_addr=10.0.0.1 --master_port=29511 --no_local_rank "
        "--module moetrain train a.yaml --engine.kind deepspeed\n"
    )
    assert done.returncode == 0
    assert not (deepspeed.folder / "deepspeed.calls").exists()


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (None, "HOSTFILE (hostfile) is not a file; write one line per host: worker-0 slots=8"),
        ("", "HOSTFILE (hostfile) must name two hosts or more"),
        ("worker-0\nworker-1\n", "HOSTFILE (hostfile) must name two hosts or more"),
        ("worker-0 slots=8\n", "on a single host use launch/train.sh a.yaml --engine.kind deep"),
    ],
)
def test_a_hostfile_without_several_hosts_is_refused(
    deepspeed: Stubs, hosts: str | None, message: str
) -> None:
    path = deepspeed.folder.parent / "hostfile"
    path.unlink() if hosts is None else path.write_text(hosts)
    done = deepspeed_sh(deepspeed, "a.yaml")
    assert done.returncode == 2
    assert message in done.stderr
    assert list(deepspeed.folder.glob("*.calls")) == []


def test_deepspeed_starts_nothing_that_the_check_refuses(deepspeed: Stubs) -> None:
    done = deepspeed_sh(deepspeed, "a.yaml", FAIL="moetrain: error: no")
    assert done.returncode == 2
    assert done.stderr == "moetrain: error: no\n"
    assert not (deepspeed.folder / "deepspeed.calls").exists()


# ---- Kubernetes ----------------------------------------------------------------------------------
# The part of trainer.kubeflow.org/v1alpha1 that a job of ours uses, after the API reference of
# Kubeflow Trainer 2.3 and Kubernetes' core/v1.


class Resource(BaseModel):
    """Fields in camel case, no unknown ones, nothing converted."""

    model_config = ConfigDict(
        extra="forbid", strict=True, alias_generator=to_camel, populate_by_name=False
    )


Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?([KMGT]i?|m)?$")]


class Metadata(Resource):
    name: Name


class RuntimeRef(Resource):
    name: Name
    api_group: Literal["trainer.kubeflow.org"] = "trainer.kubeflow.org"
    kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"


class Limits(Resource):
    limits: dict[str, Quantity]


class Trainer(Resource):
    image: str
    num_nodes: Annotated[int, Field(ge=1)]
    resources_per_node: Limits
    command: list[str]
    args: list[str]


class Mount(Resource):
    name: Name
    mount_path: Annotated[str, Field(pattern="^/")]


class Container(Resource):
    name: Literal["node"]
    """The runtime's container for training; it takes no variables from a patch."""
    volume_mounts: list[Mount]


class EmptyDir(Resource):
    medium: Literal["", "Memory"]
    size_limit: Quantity


class Claim(Resource):
    claim_name: Name


class Volume(Resource):
    name: Name
    persistent_volume_claim: Claim | None = None
    empty_dir: EmptyDir | None = None


class Security(Resource):
    run_as_non_root: bool
    fs_group: int


class Pod(Resource):
    security_context: Security
    containers: list[Container]
    volumes: list[Volume]


class PodTemplate(Resource):
    spec: Pod


class JobSpec(Resource):
    template: PodTemplate


class Job(Resource):
    spec: JobSpec


class ReplicatedJob(Resource):
    name: Literal["node"]
    template: Job


class JobSetSpec(Resource):
    replicated_jobs: list[ReplicatedJob]


class JobSet(Resource):
    spec: JobSetSpec


class Runtime(Resource):
    template: JobSet


class Patch(Resource):
    manager: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[a-z0-9._-]+$")]
    training_runtime_spec: Runtime


class Spec(Resource):
    runtime_ref: RuntimeRef
    trainer: Trainer
    runtime_patches: list[Patch]


class TrainJob(Resource):
    api_version: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainJob"]
    metadata: Metadata
    spec: Spec


@pytest.fixture(scope="module")
def train_job() -> TrainJob:
    return TrainJob.model_validate(yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text()))


def test_the_train_job_mounts_what_it_declares(train_job: TrainJob) -> None:
    (patch,) = train_job.spec.runtime_patches
    (job,) = patch.training_runtime_spec.template.spec.replicated_jobs
    pod = job.template.spec.template.spec
    (container,) = pod.containers
    volumes = {volume.name: volume for volume in pod.volumes}
    mounts = {mount.mount_path: mount.name for mount in container.volume_mounts}
    assert set(mounts.values()) == volumes.keys()
    assert volumes[mounts["/runs"]].persistent_volume_claim is not None
    assert volumes[mounts["/dev/shm"]].empty_dir is not None
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"USER {pod.security_context.fs_group}\n" in dockerfile
    assert not train_job.spec.trainer.image.endswith(":latest")


def test_the_train_job_starts_train_sh_with_the_runtimes_nodes(
    train_job: TrainJob, tmp_path: Path
) -> None:
    trainer = train_job.spec.trainer
    arguments, environ = handed_to_train_sh(
        tmp_path,
        [*trainer.command, *trainer.args],
        PET_NNODES=str(trainer.num_nodes),
        PET_NODE_RANK="1",
        PET_MASTER_ADDR="moetrain-node-0-0.moetrain",
        PET_MASTER_PORT="29400",
    )
    assert environ == {
        "NNODES": str(trainer.num_nodes),
        "NODE_RANK": "1",
        "MASTER_ADDR": "moetrain-node-0-0.moetrain",
        "MASTER_PORT": "29400",
    }
    assert arguments == trainer.args
    check(arguments, trainer.num_nodes * int(trainer.resources_per_node.limits["nvidia.com/gpu"]))


def handed_to_train_sh(
    tmp_path: Path, command: list[str], **variables: str
) -> tuple[list[str], dict[str, str]]:
    """The arguments and our variables that a command starts launch/train.sh with."""
    stubs = Stubs(tmp_path / "launch")
    stubs.folder.mkdir()
    stubs.add("train.sh")
    done = run(*command, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    (call,) = stubs.calls("train.sh")
    names = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC")
    return call.arguments, {n: call.environ[n] for n in names if n in call.environ}


# ---- SkyPilot ------------------------------------------------------------------------------------
# After SkyPilot's YAML specification, version 0.14.


class Section(BaseModel):
    """No unknown fields, nothing converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Machines(Section):
    infra: str
    accelerators: Annotated[str, Field(pattern=r"^[A-Z0-9-]+:[0-9]+$")]


class Task(Section):
    name: Name
    num_nodes: Annotated[int, Field(ge=1)]
    resources: Machines
    workdir: Literal["."]
    volumes: dict[Annotated[str, Field(pattern="^/")], Name]
    setup: str
    run: str


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.model_validate(yaml.safe_load((ROOT / "launch/sky.yaml").read_text()))


def test_the_sky_task_starts_train_sh_with_its_nodes(task: Task, tmp_path: Path) -> None:
    arguments, environ = handed_to_train_sh(
        tmp_path,
        ["bash", "-c", task.run],
        SKYPILOT_NUM_NODES=str(task.num_nodes),
        SKYPILOT_NODE_RANK="1",
        SKYPILOT_NODE_IPS="10.0.0.7\n10.0.0.9",
    )
    assert environ == {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.7"}
    check(arguments, task.num_nodes * int(task.resources.accelerators.rpartition(":")[2]))
    out = arguments[arguments.index("--out") + 1]
    assert out in task.volumes


def test_the_sky_task_sets_up_what_train_sh_uses(task: Task) -> None:
    done = run("bash", "-c", f"{task.setup} && command -v python")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == Path(sys.prefix, "bin/python")


# ---- what nodes would run ------------------------------------------------------------------------


def test_jobs_show_what_their_nodes_would_run(
    train_job: TrainJob, task: Task, stubs: Stubs
) -> None:
    """With --dry-run before the configuration; both are asked for the same training."""
    stubs.add("python")  # finds every configuration right
    node = {"VENV": str(stubs.folder.parent), "NPROC": "8", "CUDA_VISIBLE_DEVICES": ""}
    command = [*train_job.spec.trainer.command, "--dry-run", *train_job.spec.trainer.args]
    ours = run(
        *command, PET_NNODES="2", PET_NODE_RANK="1", PET_MASTER_ADDR="one",
        PET_MASTER_PORT="29500", **node,
    )  # fmt: skip
    script = task.run.replace("train.sh ", "train.sh --dry-run ")
    theirs = run(
        *("bash", "-c", script), SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1",
        SKYPILOT_NODE_IPS="one\ntwo", **node,
    )  # fmt: skip
    assert ours.returncode == theirs.returncode == 0, ours.stderr + theirs.stderr
    for checked in stubs.calls("python"):
        assert cli.main(checked.arguments[2:]) == 0
    agent = "moetrain.torchrun --nproc-per-node=8 --nnodes=2 --node-rank=1 --master-addr=one "
    assert agent in ours.stdout
    assert ours.stdout.replace("=", " ") == theirs.stdout.replace("=", " ")


# ---- what the documentation starts ---------------------------------------------------------------


def test_documented_jobs_fit_the_ranks_that_they_ask_for(stubs: Stubs, tmp_path: Path) -> None:
    page = (ROOT / "docs/running.md").read_text()
    (job,) = re.findall(r"^sbatch --nodes=(\d+) --gpus-per-node=(\d+) (.*)$", page, re.MULTILINE)
    check(shlex.split(job[2].partition("launch/slurm.sbatch ")[2]), int(job[0]) * int(job[1]))
    hosts, command = re.findall(r"^(printf .*)\n(HOSTFILE=.*)$", page, re.MULTILINE)[0]
    stubs.add("deepspeed")
    stubs.add("python")
    script = (
        f"cd '{tmp_path}' && {hosts} && export HOSTFILE=$PWD/hostfile && cd '{ROOT}' && {command}"
    )
    done = run("bash", "-c", script.replace("HOSTFILE=hostfile ", ""), VENV=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (call,) = stubs.calls("python")
    assert call.arguments[-2:] == ["--world-size", "16"]
    assert cli.main(call.arguments[2:]) == 0
    assert "--engine.kind" in stubs.calls("deepspeed")[0].arguments


@pytest.mark.parametrize("name", ["kubernetes.yaml", "sky.yaml", "slurm.sbatch", "deepspeed.sh"])
def test_a_launcher_says_first_how_it_is_used(name: str) -> None:
    text = (ROOT / "launch" / name).read_text()
    comment = re.match(r"(#!.*\n)?((#.*\n)+)", text)
    assert comment is not None
    assert re.search(rf"^# Usage: .*launch/{name}", comment[2], re.MULTILINE)
