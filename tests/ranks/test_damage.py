"""Checkpoints that were damaged, resumed by ranks that are processes."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path

import pytest
from checkpoints import DAMAGES, FILES, Hostile
from jobs import Ended, job
from runs import saved_tensors, write_config

from moetrain import checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks, each saved."""
    folder = tmp_path_factory.mktemp("damage")
    sections = {"train": {"steps": 6}, "eval": {"every": 0}, "checkpoint": {"every": 1, "keep": 6}}
    config = write_config(folder, parallel={"ep": 2}, **sections)
    with job(folder, 2, "train", config) as running:
        ended = running.wait()
    assert ended.codes == [0, 0], ended.output
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def step(folder: Path, number: int) -> Path:
    return folder / "runs/run/checkpoints" / f"step-{number:08d}"


def go_on(folder: Path, *flags: object) -> Ended:
    config = folder / "run.yaml"
    flags = ("--data.source", folder / "text", "--data.cache", folder / "cache", *flags)
    with job(folder, 2, "train", config, "--out", folder / "runs", *flags) as running:
        return running.wait()


def test_a_run_goes_back_to_the_newest_that_is_whole(folder: Path) -> None:
    name = FILES[0]
    (step(folder, 6) / name).unlink()
    for number, damage in ((5, "empty"), (4, "truncated"), (3, "flipped")):
        DAMAGES[damage](step(folder, number) / name)
    (step(folder, 2) / ".metadata").write_bytes(pickle.dumps(Hostile(folder / "executed")))
    ended = go_on(folder)
    assert ended.codes == [0, 0], ended.output
    said = " ".join(ended.output.split())
    for number, why in (
        (6, "missing"),
        (5, "0 bytes instead of"),
        (4, r"\d+ bytes instead of"),
        (3, "content differs from its SHA-256"),
        (2, r"\d+ bytes instead of"),
    ):
        assert re.search(rf"step-{number:08d}\S* .*{why}", said), said
    assert "step-00000001 is taken, the newest that is whole" in said
    assert "from step 1" in said
    assert not (folder / "executed").exists()
    last = checkpoint.latest(folder / "runs/run")
    assert last == step(folder, 6)
    assert saved_tensors(last)


def refused(folder: Path, *flags: object) -> str:
    """What is said where nothing starts; and that nothing is lost."""
    before = sorted((folder / "runs").rglob("*"))
    ended = go_on(folder, *flags)
    said = ended.output + ended.last_words
    assert ended.codes == [2, 2], said
    assert "Traceback" not in said
    assert sorted((folder / "runs").rglob("*")) == before
    return said


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_that_is_named_is_refused_by_the_file_that_is_damaged(
    folder: Path, damage: str
) -> None:
    DAMAGES[damage](step(folder, 4) / FILES[0])
    assert FILES[0] in refused(folder, "--checkpoint.resume", step(folder, 4))


def test_a_step_that_is_not_there_is_no_fresh_start(folder: Path) -> None:
    assert "step-00000007" in refused(folder, "--checkpoint.resume", step(folder, 7))


def test_of_another_model_every_tensor_that_differs_is_listed(folder: Path) -> None:
    said = refused(folder, "--checkpoint.resume", step(folder, 6), "--model.layers", 3)
    assert "36 tensors differ" in said
    listed = re.findall(r"^  (\S+): absent saved", said, re.MULTILINE)
    assert len(listed) == 36
    assert all(".blocks.2." in f".{name}" for name in listed)
