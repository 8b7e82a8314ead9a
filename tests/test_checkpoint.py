"""Checkpoints: bitwise through any layout, whole after any kill, refused after any damage."""

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moetrain import checkpoint
from moetrain.checkpoint import CheckpointError, DamagedCheckpointError
from moetrain.checkpoint.manifest import MANIFEST, MARKER, save_number, seal
from moetrain.errors import UserError
from moetrain.testing import run_ranks, simulate_ranks

EXTRA = {"step": 100, "seed": 7, "config": {"moe": {"capacity_factor": None}}, "cursor": [3, 2**60]}
FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata", MANIFEST, MARKER)


def make_state(edp: int, ep: int, seed: int) -> dict[str, torch.Tensor]:
    """The same logical values for a seed, however they are laid out; few sizes divide evenly."""
    mesh = init_device_mesh("cpu", (edp, ep), mesh_dim_names=("edp", "ep"))
    data = mesh._flatten("dp")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def place(full: torch.Tensor, on, placements) -> torch.Tensor:
        return distribute_tensor(full, on, placements, src_data_rank=None)

    return {
        "model.experts.up": place(draw(4, 6, 3), mesh, [Shard(1), Shard(0)]).requires_grad_(),
        "model.embedding": place(draw(7, 5), data, [Shard(0)]).requires_grad_(),
        "model.router": place(draw(5, 4).double(), data, [Replicate()]),
        "model.norm": place(draw(3).bfloat16(), data, [Shard(0)]),
        "optimizer.experts.up.exp_avg": place(draw(4, 6, 3), mesh, [Shard(1), Shard(0)]),
        "optimizer.experts.up.step": torch.tensor(float(seed)),
        "counts": torch.arange(5) + seed,
    }


def logical(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in state.items()
    }


def is_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    a, b = logical(a), logical(b)
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a
    )


def save(run: Path, step: int, seed: int, edp: int = 1, ep: int = 1, extra=EXTRA) -> Path:
    """Save make_state(seed) from simulated ranks."""
    return simulate_ranks(
        edp * ep, lambda: checkpoint.save(run, step, make_state(edp, ep, seed), extra)
    )[0]


def holds(path: Path | None, seed: int, edp: int = 1, ep: int = 1) -> bool:
    """Whether the checkpoint, loaded in this layout, has the values of `seed` on every rank."""
    assert path is not None

    def check() -> bool:
        state = make_state(edp, ep, seed=12345)
        extra = checkpoint.load(path, state)
        return extra == EXTRA and is_same(state, make_state(edp, ep, seed))

    return all(simulate_ranks(edp * ep, check))


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory) -> Path:
    """A run with one checkpoint of two ranks, for tests that copy it or only read it."""
    run = tmp_path_factory.mktemp("run")
    save(run, 100, seed=1, edp=1, ep=2)
    return run


@pytest.fixture
def run(saved_once, tmp_path) -> Path:
    return Path(shutil.copytree(saved_once, tmp_path / "run"))


@pytest.fixture
def path(run) -> Path:
    return run / "checkpoints" / "step-00000100"


# ---- what is saved is what is loaded


@pytest.mark.parametrize(("edp", "ep"), [(1, 1), (2, 1), (1, 2), (1, 4), (2, 2), (4, 2), (8, 1)])
def test_every_layout_loads_the_same_values(saved_once, edp, ep):
    assert holds(checkpoint.latest(saved_once), 1, edp, ep)


@pytest.mark.parametrize(("edp", "ep"), [(1, 1), (2, 2), (8, 1)])
def test_every_layout_saves_the_same_values(tmp_path, edp, ep):
    # (8, 1): more ranks than rows or columns, so that some own nothing of a tensor.
    assert holds(save(tmp_path, 5, seed=3, edp=edp, ep=ep), 3, 1, 2)


def test_processes_load_what_threads_saved(path, ranks2):
    assert ranks2.run(load_in_process, path) == [True, True]


def load_in_process(path: Path) -> bool:
    state = make_state(2, 1, 9)
    return checkpoint.load(path, state) == EXTRA and is_same(state, make_state(2, 1, 1))


def make_model() -> tuple[torch.optim.Optimizer, dict[str, torch.Tensor]]:
    """A layer sharded over all ranks, and every tensor of it and its optimizer by name."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(nn.Linear(5, 6, dtype=torch.float64), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    tensors: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():
        moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
        tensors[f"model.{name}"] = p
        tensors |= {f"optimizer.{name}.{key}": t for key, t in optimizer.state[p].items()}
    return optimizer, tensors


def ramp(like: torch.Tensor, end: float) -> torch.Tensor:
    """A DTensor whose logical values do not depend on the layout."""
    assert isinstance(like, DTensor)
    full = torch.linspace(-1, end, like.numel(), dtype=like.dtype).view(like.shape)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def take_step(optimizer: torch.optim.Optimizer) -> None:
    for number, p in enumerate(optimizer.param_groups[0]["params"]):
        p.grad = ramp(p, end=number)
    optimizer.step()


def test_a_sharded_model_continues_in_another_world(tmp_path):
    """Weights and AdamW's state move from 2 ranks to 4, and the next step is the same."""

    def interrupted() -> dict[str, torch.Tensor]:
        optimizer, tensors = make_model()
        with torch.no_grad():
            for p in optimizer.param_groups[0]["params"]:
                p.copy_(ramp(p, end=2))
        take_step(optimizer)
        checkpoint.save(tmp_path, 1, tensors, {})
        take_step(optimizer)
        return logical(tensors)

    def resumed() -> dict[str, torch.Tensor]:
        optimizer, tensors = make_model()
        assert checkpoint.load_latest(tmp_path, tensors) is not None
        take_step(optimizer)
        return logical(tensors)

    before, after = simulate_ranks(2, interrupted)[0], simulate_ranks(4, resumed)[3]
    assert before["optimizer.weight.step"] == 2
    assert before["optimizer.weight.exp_avg"].any()
    assert is_same(before, after)


def test_a_prefix_loads_that_part_alone(path):
    def weights() -> bool:
        part = {n: t for n, t in make_state(1, 2, 9).items() if n.startswith("model.")}
        checkpoint.load(path, part, prefix="model.")
        return is_same(part, {n: t for n, t in make_state(1, 2, 1).items() if n in part})

    assert simulate_ranks(2, weights) == [True, True]


def test_manifest_tells_what_there_is(path):
    manifest = checkpoint.read_manifest(path)
    assert (manifest.version, manifest.step, manifest.extra) == (1, 100, EXTRA)
    assert {file.name for file in manifest.files} == {*FILES} - {MANIFEST, MARKER}
    experts = manifest.tensors["model.experts.up"]
    assert (experts.shape, experts.dtype) == ([4, 6, 3], "float32")
    assert [piece.sizes for piece in experts.pieces] == [[2, 6, 3]] * 2
    assert manifest.tensors["optimizer.experts.up.step"].shape == []
    assert str(manifest.tensors["model.norm"]) == "[3] bfloat16"


def test_extra_that_json_cannot_hold_is_an_error_and_leaves_nothing(run):
    with pytest.raises(CheckpointError, match="rank 0: ValidationError"):
        save(run, 200, seed=2, edp=2, extra={"path": Path("x")})
    assert names_in(run) == ["step-00000100"]


# ---- another model


def test_every_difference_is_listed_and_nothing_is_touched(path):
    def attempt() -> tuple[str, bool]:
        state = make_state(1, 2, 9)
        del state["counts"]
        state["model.norm"] = torch.zeros(3)
        state["model.router"] = torch.zeros(5, 8, dtype=torch.float64)
        state["model.bias"] = torch.zeros(2)
        before = logical(state)
        with pytest.raises(UserError) as caught:
            checkpoint.load(path, state)
        return str(caught.value), is_same(before, state)

    for message, is_untouched in simulate_ranks(2, attempt):
        assert is_untouched
        assert message.splitlines() == [
            f"{path} is of another model, 4 tensors differ:",
            "  counts: [5] int64 saved, absent wanted",
            "  model.bias: absent saved, [2] float32 wanted",
            "  model.norm: [3] bfloat16 saved, [3] float32 wanted",
            "  model.router: [5, 4] float64 saved, [5, 8] float64 wanted",
        ]


# ---- damage


def flip_one_bit(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << (position % 8)
    file.write_bytes(content)


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "flipped": lambda file: flip_one_bit(file, file.stat().st_size // 2),
}


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_nothing_is_touched(path, name, damage, num_ranks):
    DAMAGES[damage](path / name)

    def attempt() -> tuple[str, bool]:
        state = make_state(num_ranks, 1, 9)
        with pytest.raises(DamagedCheckpointError) as caught:
            checkpoint.load(path, state)
        return str(caught.value), is_same(state, make_state(num_ranks, 1, 9))

    outcomes = simulate_ranks(num_ranks, attempt)
    assert len({message for message, _ in outcomes}) == 1
    assert all(name in message and is_untouched for message, is_untouched in outcomes)


@pytest.mark.parametrize("name", [MARKER, MANIFEST])
def test_no_bit_of_manifest_or_marker_can_change(path, name):
    intact = (path / name).read_bytes()
    for position in range(0, len(intact), 1 + len(intact) // 200):
        flip_one_bit(path / name, position)
        with pytest.raises(DamagedCheckpointError):
            checkpoint.read_manifest(path)
        (path / name).write_bytes(intact)
    assert checkpoint.read_manifest(path).step == 100


def test_all_damaged_files_are_listed(path):
    for name in FILES[:3]:
        (path / name).unlink()
    with pytest.raises(DamagedCheckpointError) as caught:
        holds(path, 1, 1, 2)
    assert sorted(str(caught.value).splitlines()) == sorted(
        f"{path / name}: missing" for name in FILES[:3]
    )


def test_resume_falls_back_to_the_one_before_with_a_warning(run):
    (save(run, 200, seed=2) / "__0_0.distcp").write_bytes(b"")

    def resume() -> tuple[str, bool]:
        state = make_state(2, 1, 9)
        found = checkpoint.load_latest(run, state)
        assert found is not None
        return found[0].name, found[1] == EXTRA and is_same(state, make_state(2, 1, 1))

    with pytest.warns(UserWarning, match=r"falling back.*step-00000200/__0_0\.distcp: 0 bytes"):
        assert simulate_ranks(2, resume) == [("step-00000100", True)] * 2


@pytest.mark.parametrize("name", ["__0_0.distcp", MARKER])
def test_a_run_with_nothing_but_damage_does_not_start_afresh(run, path, name):
    (path / name).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="step-00000100"),
        pytest.raises(UserError, match=r"all checkpoints of .* are damaged"),
    ):
        simulate_ranks(1, lambda: checkpoint.load_latest(run, make_state(1, 1, 9)))


def test_a_run_that_never_saved_starts_afresh(tmp_path):
    (tmp_path / "checkpoints" / "step-00000100.partial").mkdir(parents=True)
    assert simulate_ranks(2, lambda: checkpoint.load_latest(tmp_path, {})) == [None, None]
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_another_model_is_an_error_and_no_reason_to_fall_back(run):
    save(run, 200, seed=2)
    with pytest.raises(UserError, match="step-00000200 is of another model"):
        simulate_ranks(1, lambda: checkpoint.load_latest(run, {"model.x": torch.zeros(1)}))


# ---- hostile files


class Hostile:
    """Unpickled, it makes a directory."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def reseal(path: Path, **changes) -> None:
    """Make manifest and marker fit the files again, as someone with bad intent would."""
    manifest = json.loads((path / MANIFEST).read_bytes()) | changes
    for entry in manifest["files"]:
        content = (path / entry["name"]).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    content = json.dumps(manifest).encode()
    (path / MANIFEST).write_bytes(content)
    (path / MARKER).write_bytes(seal(save_number(path), content))


def test_a_poisoned_index_is_refused_and_never_unpickled(path, tmp_path):
    trace = tmp_path / "executed"
    (path / ".metadata").write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata"):
        holds(path, 1)
    reseal(path)
    assert holds(path, 1)
    assert not trace.exists()


def test_poisoned_tensors_are_not_executed(path, tmp_path):
    trace = tmp_path / "executed"
    for name in FILES[:2]:
        torch.save(Hostile(trace), path / name)
    manifest = json.loads((path / MANIFEST).read_bytes())
    for entry in manifest["tensors"].values():
        for piece in entry["pieces"]:
            piece |= {"start": 0, "bytes": (path / piece["file"]).stat().st_size}
    reseal(path, tensors=manifest["tensors"])
    with pytest.raises(CheckpointError, match=r"could not be read: rank 0: UnpicklingError"):
        simulate_ranks(2, lambda: checkpoint.load(path, make_state(2, 1, 9)))
    assert not trace.exists()


def test_a_manifest_cannot_point_elsewhere_nor_be_of_another_version(path):
    tensors = json.loads((path / MANIFEST).read_bytes())["tensors"]
    tensors["counts"]["pieces"][0]["file"] = "../__0_0.distcp"
    reseal(path, tensors=tensors)
    with pytest.raises(UserError, match=r"tensors\.counts\.pieces\.0\.file"):
        checkpoint.read_manifest(path)
    reseal(path, version=2)
    with pytest.raises(UserError, match="is not of version 1: version"):
        checkpoint.read_manifest(path)


# ---- which checkpoints there are


def test_resolve_takes_a_run_its_folder_or_a_checkpoint(run, path):
    newest = save(run, 200, seed=2)
    assert checkpoint.committed(run) == [path, newest]
    assert checkpoint.resolve(run) == newest
    assert checkpoint.resolve(str(run / "checkpoints")) == newest
    assert checkpoint.resolve(path) == path
    copy = shutil.copytree(path, run.parent / "copy")
    assert checkpoint.resolve(copy) == copy


def test_resolve_names_what_there_is(run, tmp_path):
    save(run, 200, seed=2)
    folder = run / "checkpoints"
    (folder / "step-00000300.partial").mkdir()
    there = "complete checkpoints in .*: step-00000100, step-00000200$"
    with pytest.raises(UserError, match=f"step-00000150 does not exist; {there}"):
        checkpoint.resolve(folder / "step-00000150")
    with pytest.raises(UserError, match=f"partial holds no complete checkpoint; {there}"):
        checkpoint.resolve(folder / "step-00000300.partial")
    (folder / "step-00000400").mkdir()
    with (
        pytest.warns(UserWarning, match="step-00000400 is ignored"),
        pytest.raises(UserError, match=f"step-00000400 holds no complete checkpoint; {there}"),
    ):
        checkpoint.resolve(folder / "step-00000400")
    with pytest.raises(UserError, match="is no run with checkpoints"):
        checkpoint.resolve(tmp_path / "nothing")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no complete checkpoint; .*: none$"):
        checkpoint.resolve(tmp_path / "empty")


def test_a_run_that_went_back_continues_from_what_it_saved_since(run):
    save(run, 200, seed=2)
    again = save(run, 150, seed=3)
    assert checkpoint.latest(run) == again
    checkpoint.prune(run, keep=1)
    assert checkpoint.committed(run) == [again]


def test_a_step_saved_twice_is_the_second(run, path):
    assert save(run, 100, seed=2, edp=2) == path
    assert holds(path, 2)
    assert names_in(run) == ["step-00000100"]


def test_retention_keeps_the_newest(run):
    for step in (200, 300):
        save(run, step, seed=step)
    checkpoint.prune(run, keep=5)
    assert len(checkpoint.committed(run)) == 3
    checkpoint.prune(run, keep=2)
    assert names_in(run) == ["step-00000200", "step-00000300"]
    checkpoint.prune(run, keep=1)
    assert holds(checkpoint.latest(run), 300)
    with pytest.raises(AssertionError):
        checkpoint.prune(run, keep=0)


def test_only_rank_0_deletes(run):
    save(run, 200, seed=2)

    def prune_unless_first() -> int:
        if dist.get_rank() > 0:
            checkpoint.prune(run, keep=1)
        dist.barrier()
        return len(checkpoint.committed(run))

    assert simulate_ranks(2, prune_unless_first) == [2, 2]


@pytest.mark.parametrize("locked", ["checkpoints", "checkpoints/step-00000100"])
def test_a_failed_delete_is_a_warning_and_the_next_save_works(run, locked):
    save(run, 200, seed=2)
    run_ranks(1, prune_without_permission, run, run / locked)
    save(run, 300, seed=3)
    assert checkpoint.latest(run) == run / "checkpoints" / "step-00000300"
    assert holds(run / "checkpoints" / "step-00000200", 2)
    checkpoint.prune(run, keep=1)
    assert names_in(run) == ["step-00000300"]


def prune_without_permission(run: Path, locked: Path) -> None:
    """In a process of its own: root, whom permissions do not stop, becomes nobody."""
    os.chdir(run)
    locked.chmod(0o555)
    if os.getuid() == 0:
        for place in [run, *run.rglob("*")]:
            os.chown(place, 65534, 65534)
        os.setuid(65534)
    try:
        with pytest.warns(UserWarning, match=r"step-00000100.* could not be deleted: .*denied"):
            checkpoint.prune(Path(), keep=1)
    finally:
        for place in Path().rglob("*"):
            if place.is_dir():
                place.chmod(0o755)


# ---- failures while saving


def test_a_full_disk_on_one_rank_is_the_same_error_on_all(run, path, ranks2):
    messages = ranks2.run(save_with_little_space, run)
    assert len(set(messages)) == 1
    assert "step-00000200 was not saved" in messages[0]
    assert f"rank 1: OSError: [Errno {errno.EFBIG}]" in messages[0]
    assert holds(path, 1)
    assert names_in(run) == ["step-00000100", "step-00000300"]
    assert holds(checkpoint.latest(run), 3)


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


def test_ranks_that_share_no_disk_are_told(run, path, monkeypatch):
    is_dir = Path.is_dir

    def is_dir_here(place: Path) -> bool:
        return is_dir(place) and (dist.get_rank() == 0 or place.suffix != ".partial")

    monkeypatch.setattr(Path, "is_dir", is_dir_here)
    with pytest.raises(UserError, match=r"step-00000200\.partial, made by rank 0, is not visible"):
        save(run, 200, seed=2, edp=2)
    monkeypatch.undo()
    assert checkpoint.latest(run) == path


VICTIMS = [(1, 1), (1, 3), (0, 4), (0, 12)]
"""(rank, operation): before its file, half-way in it; rank 0 while others wait, at the commit."""


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


@pytest.mark.parametrize(("victim", "operation"), VICTIMS)
def test_when_a_rank_is_killed_the_other_ends_and_the_last_save_stays(killed, victim, operation):
    scene = killed / "peer" / f"{victim}-{operation}"
    assert (scene / "survivor").read_text().startswith(f"{1 - victim} RuntimeError")
    assert holds(checkpoint.latest(scene), 1)
    assert holds(save(scene, 200, seed=4), 4)
    assert names_in(scene) == ["step-00000100", "step-00000200"]


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
    try:
        checkpoint.save(scene, 200, state, EXTRA)
    except RuntimeError as error:
        (scene / "survivor").write_text(f"{rank} {type(error).__name__}: {error}")
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


def kill_one(run: Path, scenes: Path, victim: int, operation: int) -> None:
    """Save from two ranks and kill one; the other must end by itself."""
    scene = Path(shutil.copytree(run, scenes / f"{victim}-{operation}"))
    ranks = [fork_rank(scene, r, 2, operation if r == victim else 0) for r in (0, 1)]
    statuses = [status_of(process) for process in ranks]
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    first, again, out = map(Path, sys.argv[1:])
    # What torch imports on first use is then imported once, not in every fork.
    save(out.with_name("rehearsal"), 1, seed=0)
    kill_everywhere(first, out / "first")
    kill_everywhere(again, out / "again")
    for one in VICTIMS:
        kill_one(first, out / "peer", *one)
