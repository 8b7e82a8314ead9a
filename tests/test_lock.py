"""Two runs of one name: what the second is told, and that a killed one stands in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from runs import train, write_config

from moetrain import lock
from moetrain.errors import UserError
from moetrain.mesh import process_group
from moetrain.testing import simulate_ranks

FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported torch alone


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs" / "run"


def hold_until_killed(folder: Path, held: Connection) -> None:
    with process_group(), lock.hold(folder):
        held.send(os.getpid())
        signal.pause()


def holding(folder: Path, work: Callable[[], None] = lambda: None) -> str:
    """Work while holding the lock; returns the error there was instead."""
    try:
        with lock.hold(folder):
            work()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.usefixtures("_server")
def test_the_second_run_is_told_who_has_the_folder_until_that_one_is_killed(
    tmp_path, folder, capsys
):
    config = write_config(tmp_path, eval={"every": 0}, checkpoint={"every": 0}, train={"steps": 1})
    receiver, sender = FORKS.Pipe(duplex=False)
    other = FORKS.Process(target=hold_until_killed, args=(folder, sender))
    other.start()
    try:
        assert receiver.poll(60)
        pid = receiver.recv()
        before = sorted(folder.iterdir())
        assert train(config) == 2
        error = capsys.readouterr().err
        named = f"{folder} is in use by process {pid} on {socket.gethostname()}, since 20"
        assert f"moetrain: error: {named}" in error
        assert "; end that run first, or give this one another name\n" in error
        assert "Traceback" not in error
        assert sorted(folder.iterdir()) == before, "nothing of the other run is touched"
        assert train(config, "--name", "another") == 0
    finally:
        other.kill()
        other.join()
    assert train(config) == 0
    assert not (set(capsys.readouterr().err.split()) & {"lock", "use"})


def test_all_ranks_are_told_the_same(folder):
    def of_rank() -> list[str]:
        inside: list[str] = []
        assert holding(folder, lambda: inside.append(holding(folder))) == ""
        return [*inside, holding(folder)]

    (refused, after), *others = simulate_ranks(3, of_rank)
    assert f"in use by process {os.getpid()} on" in refused
    assert after == "", "it is free again"
    assert others == [[refused, after]] * 2


def test_a_holder_that_has_not_written_yet_is_another_process(folder):
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (message,) = simulate_ranks(1, lambda: holding(folder))
    assert "in use by another process; " in message


@pytest.mark.parametrize("code", sorted(lock.NO_LOCKS), ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_a_warning(folder, monkeypatch, code):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"lock cannot be locked .*would go unnoticed") as warned:
        assert simulate_ranks(2, lambda: holding(folder)) == ["", ""]
    assert len(warned) == 1


def test_a_folder_that_cannot_be_made_is_named_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")
    first, second = simulate_ranks(2, lambda: holding(tmp_path / "file" / "run"))
    assert first == second
    assert first == (
        f"out ({tmp_path / 'file'}) cannot hold {tmp_path / 'file' / 'run'}: Not a directory; "
        "set one that can"
    )
