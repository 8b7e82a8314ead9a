"""Checkpoints: which a run has, which one a path means, which ones go."""

import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from checkpoints import holds, names_in, save

from moetrain import checkpoint
from moetrain.errors import UserError
from moetrain.testing import run_ranks, simulate_ranks


def test_resolve_takes_a_run_its_folder_or_a_checkpoint(saved_run, saved):
    newest = save(saved_run, 200, seed=2)
    assert checkpoint.committed(saved_run) == [saved, newest]
    assert checkpoint.resolve(saved_run) == newest
    assert checkpoint.resolve(str(saved_run / "checkpoints")) == newest
    assert checkpoint.resolve(saved) == saved
    copy = shutil.copytree(saved, saved_run.parent / "copy")
    assert checkpoint.resolve(copy) == copy


def test_resolve_names_what_there_is(saved_run, tmp_path):
    save(saved_run, 200, seed=2)
    folder = saved_run / "checkpoints"
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


def test_a_run_that_went_back_continues_from_what_it_saved_since(saved_run):
    save(saved_run, 200, seed=2)
    again = save(saved_run, 150, seed=3)
    assert checkpoint.latest(saved_run) == again
    checkpoint.prune(saved_run, keep=1)
    assert checkpoint.committed(saved_run) == [again]


def test_a_step_saved_twice_is_the_second(saved_run, saved):
    assert save(saved_run, 100, seed=2, edp=2) == saved
    assert holds(saved, 2)
    assert names_in(saved_run) == ["step-00000100"]


def test_retention_keeps_the_newest(saved_run):
    for step in (200, 300):
        save(saved_run, step, seed=step)
    checkpoint.prune(saved_run, keep=5)
    assert len(checkpoint.committed(saved_run)) == 3
    checkpoint.prune(saved_run, keep=2)
    assert names_in(saved_run) == ["step-00000200", "step-00000300"]
    checkpoint.prune(saved_run, keep=1)
    assert holds(checkpoint.latest(saved_run), 300)
    with pytest.raises(AssertionError):
        checkpoint.prune(saved_run, keep=0)


def test_only_rank_0_deletes(saved_run):
    save(saved_run, 200, seed=2)

    def prune_unless_first() -> int:
        if dist.get_rank() > 0:
            checkpoint.prune(saved_run, keep=1)
        dist.barrier()
        return len(checkpoint.committed(saved_run))

    assert simulate_ranks(2, prune_unless_first) == [2, 2]


@pytest.mark.parametrize("locked", ["checkpoints", "checkpoints/step-00000100"])
def test_a_failed_delete_is_a_warning_and_the_next_save_works(saved_run, locked):
    save(saved_run, 200, seed=2)
    run_ranks(1, prune_without_permission, saved_run, saved_run / locked)
    save(saved_run, 300, seed=3)
    assert checkpoint.latest(saved_run) == saved_run / "checkpoints" / "step-00000300"
    assert holds(saved_run / "checkpoints" / "step-00000200", 2)
    checkpoint.prune(saved_run, keep=1)
    assert names_in(saved_run) == ["step-00000300"]


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
