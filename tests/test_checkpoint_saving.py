"""Checkpoints of processes: whole after any failure of a save, at every operation, on any rank."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoints import EXTRA, holds, is_same, make_state, names_in, save

from moetrain import checkpoint
from moetrain.checkpoint import CheckpointError
from moetrain.errors import UserError


def test_processes_load_what_threads_saved(saved, ranks2):
    assert ranks2.run(load_in_process, saved) == [True, True]


def load_in_process(path: Path) -> bool:
    state = make_state(2, 1, 9)
    return checkpoint.load(path, state) == EXTRA and is_same(state, make_state(2, 1, 1))


def test_a_full_disk_on_one_rank_is_the_same_error_on_all(saved_run, saved, ranks2):
    messages = ranks2.run(save_with_little_space, saved_run)
    assert len(set(messages)) == 1
    assert "step-00000200 was not saved" in messages[0]
    assert f"rank 1: OSError: [Errno {errno.EFBIG}]" in messages[0]
    assert holds(saved, 1)
    assert names_in(saved_run) == ["step-00000100", "step-00000300"]
    assert holds(checkpoint.latest(saved_run), 3)


def save_with_little_space(run: Path) -> str:
    """The system refuses files of rank 1 beyond 1000 bytes, and after the failure no more."""
    # Made first: new groups write to a file of the pool.
    state, later = make_state(1, 2, 2), make_state(1, 2, 3)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(run, 200, state, EXTRA)
    assert names_in(run) == ["step-00000100"] or dist.get_rank() == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    checkpoint.save(run, 300, later, EXTRA)
    return str(caught.value)


def test_ranks_that_share_no_disk_are_told(saved_run, saved, monkeypatch):
    is_dir = Path.is_dir

    def is_dir_here(place: Path) -> bool:
        return is_dir(place) and (dist.get_rank() == 0 or place.suffix != ".partial")

    monkeypatch.setattr(Path, "is_dir", is_dir_here)
    with pytest.raises(UserError, match=r"step-00000200\.partial, made by rank 0, is not visible"):
        save(saved_run, 200, seed=2, edp=2)
    monkeypatch.undo()
    assert checkpoint.latest(saved_run) == saved


VICTIMS = {"rank 0": (0,), "rank 1": (1,), "both": (0, 1)}


@pytest.fixture(scope="module")
def killed(saved_once, tmp_path_factory) -> Path:
    """What saves leave that were killed at every possible place; folders of runs, by plot."""
    stage = tmp_path_factory.mktemp("stage")
    save(Path(shutil.copytree(saved_once, stage / "again")), 200, seed=3)
    # Another process acts it out, because it forks.
    command = [sys.executable, __file__, str(saved_once), str(stage / "again"), str(stage / "out")]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": root}
    subprocess.run(command, check=True, env=environment, timeout=240)
    return stage / "out"


def test_kill_at_every_operation_of_a_save(killed):
    """Killed before any one operation on the disk, a save has happened whole or not at all."""
    outcomes = []
    for scene in sorted((killed / "first").iterdir()):
        path = checkpoint.latest(scene)
        outcomes.append(path.name if path else "")
        assert holds(path, {"step-00000100": 1, "step-00000200": 2}[outcomes[-1]])
        assert holds(save(scene, 200, seed=4), 4)
        assert names_in(scene) == ["step-00000100", "step-00000200"]
    assert len(outcomes) > 12
    assert outcomes == sorted(outcomes)
    assert len(set(outcomes)) == 2


def test_kill_at_every_operation_of_replacing_a_step(killed):
    """A step that is saved again is there at every moment, as it was or as it will be."""
    outcomes = []
    for scene in sorted((killed / "again").iterdir()):
        path = checkpoint.latest(scene)
        assert path
        assert checkpoint.read_manifest(path).step == 200
        outcomes.append(holds(path, 2))
        assert outcomes[-1] or holds(path, 3)
        with pytest.raises(CheckpointError):
            save(scene, 200, seed=5, extra={"path": Path("a second save that fails")})
        assert holds(checkpoint.latest(scene), 2 if outcomes[-1] else 3)
        assert holds(save(scene, 200, seed=4), 4)
        assert names_in(scene) == ["step-00000100", "step-00000200"]
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}


@pytest.mark.parametrize(
    ("victims", "num_operations"), [("rank 0", 12), ("rank 1", 2), ("both", 12)]
)
def test_kill_ranks_at_every_operation_of_a_save(killed, victims, num_operations):
    """Whoever is left ends by itself, and the checkpoint saved last loads."""
    outcomes = []
    for scene in sorted((killed / victims).iterdir()):
        path = checkpoint.latest(scene)
        assert path
        outcomes.append(path.name)
        assert holds(path, {"step-00000100": 1, "step-00000200": 2}[path.name])
    assert len(outcomes) > num_operations
    assert outcomes == sorted(outcomes)
    assert outcomes[0] == "step-00000100"
    assert outcomes[-1] == "step-00000200", "the last of them nobody killed"
    assert holds(save(scene, 300, seed=4), 4)
    assert not list((scene / "checkpoints").glob("*.partial"))


# ---- the other process


def kill_before(operation: int) -> None:
    """Kill this process before its n-th operation that changes the disk, from now on."""
    left = [operation]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple) -> None:
        is_write = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if is_write or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            count()

    def fsync(descriptor: int) -> None:
        count()
        sync(descriptor)

    sync, os.fsync = os.fsync, fsync
    sys.addaudithook(audit)


def fork_rank(scene: Path, rank: int, num_ranks: int, operation: int) -> int:
    """Save step 200 in a fork killed before that operation (0: never); return its process id."""
    process = os.fork()
    if process:
        return process
    store = dist.FileStore(str(scene / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    state = make_state(1, num_ranks, seed=2)
    dist.barrier()
    kill_before(operation)
    with suppress(RuntimeError):  # the other rank is gone
        checkpoint.save(scene, 200, state, EXTRA)
    os._exit(0)


def status_of(process: int, seconds: float = 30) -> int:
    """Wait for a process and return how it ended; kill it and fail if it does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    raise TimeoutError(f"a rank still runs after {seconds} s")


def kill_everywhere(run: Path, scenes: Path) -> None:
    """Save in a copy of the run, killed one operation later each time, until it ends."""
    for operation in range(1, 100):
        scene = Path(shutil.copytree(run, scenes / f"{operation:03}"))
        status = status_of(fork_rank(scene, 0, 1, operation))
        assert status in (0, -signal.SIGKILL), status
        if status == 0:
            return
    raise AssertionError("a save takes fewer operations than that")


def kill_ranks(run: Path, scenes: Path, victims: tuple[int, ...]) -> None:
    """Save from two ranks, the victims killed one operation later each time, until none is."""
    for operation in range(1, 100):
        scene = Path(shutil.copytree(run, scenes / f"{operation:03}"))
        ranks = [fork_rank(scene, r, 2, operation if r in victims else 0) for r in (0, 1)]
        statuses = [status_of(process) for process in ranks]
        assert all(status == 0 or r in victims for r, status in enumerate(statuses)), statuses
        if statuses == [0, 0]:
            return
    raise AssertionError("a save takes fewer operations than that")


if __name__ == "__main__":
    torch.set_num_threads(1)
    first, again, out = map(Path, sys.argv[1:])
    # What torch imports on first use is then imported once, not in every fork.
    save(out.with_name("rehearsal"), 1, seed=0)
    kill_everywhere(first, out / "first")
    kill_everywhere(again, out / "again")
    for name, ranks in VICTIMS.items():
        kill_ranks(first, out / name, ranks)
