"""A disk that is full: a small one, where the system lets us mount it."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import job
from runs import saved_tensors, write_config

from moetrain import checkpoint
from moetrain.sinks import read_metrics

DISK_BYTES = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(ballast: Path) -> None:
    """Take all the room that is left."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_saves_that_find_no_room_lose_nothing_and_the_run_says_so(
    tmp_path: Path, disk: Path, asynchronous: str
) -> None:
    config = write_config(tmp_path, parallel={"ep": 2}, train={"steps": 4000}, eval={"every": 0})
    run, ballast = disk / "run", disk / "ballast"
    flags = ("--out", disk, "--checkpoint.every", 2, "--checkpoint.asynchronous", asynchronous)
    with job(tmp_path, 2, "train", config, *flags, "--checkpoint.keep", 1) as running:
        running.wait_for_word("checkpoint of step 2 saved")
        fill(ballast)
        running.wait_for(lambda: running.said().count("was not saved") > 1)
        kept = checkpoint.latest(run)
        assert kept is not None
        assert saved_tensors(kept)
        ballast.unlink()
        running.wait_for(lambda: checkpoint.latest(run) not in (None, kept))
        running.send(signal.SIGTERM)
        ended = running.wait()
    output = ended.output
    assert ended.codes == [75, 75], output
    assert "No space left on device" in output
    assert "training goes on without it" in output
    (last,) = checkpoint.committed(run)
    assert saved_tensors(last)
    steps = [line["step"] for line in read_metrics(run)]
    assert steps == list(range(1, checkpoint.read_manifest(last).step + 1)), "no line is lost"


def test_a_last_save_that_finds_no_room_is_a_failure_without_traceback(
    tmp_path: Path, disk: Path
) -> None:
    config = write_config(tmp_path, parallel={"ep": 2}, eval={"every": 0}, checkpoint={"every": 8})
    (disk / "ballast").write_bytes(bytes(DISK_BYTES - (128 << 10)))
    with job(tmp_path, 2, "train", config, "--out", disk) as running:
        ended = running.wait()
    assert (ended.code, ended.codes) == (1, [1, 1])
    assert "moetrain: error: checkpoint" in ended.last_words
    assert "step-00000008 was not saved: " in ended.last_words
    # torch has words of its own where the disk takes a part of what it writes.
    for rank in (0, 1):
        assert re.search(
            rf"rank {rank}: .*(No space left on device|is the disk full\?)", ended.last_words
        )
    assert "Traceback" not in ended.output + ended.last_words
    assert checkpoint.latest(disk / "run") is None


def test_a_start_that_finds_no_room_is_one_message(tmp_path: Path, disk: Path) -> None:
    config = write_config(tmp_path, parallel={"ep": 2})
    (disk / "run").mkdir()
    fill(disk / "ballast")
    with job(tmp_path, 2, "train", config, "--out", disk) as running:
        ended = running.wait()
    assert (ended.code, ended.codes) == (2, [2, 2])
    assert ended.last_words.startswith(
        f"moetrain: error: out ({disk}) cannot hold {disk / 'run'}: "
    )
    assert "No space left on device" in ended.last_words
    assert "Traceback" not in ended.output + ended.last_words
