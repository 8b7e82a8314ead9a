"""Output that nobody takes: a disk that is full (`/dev/full` is one), a reader that has left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

import pytest
from runs import train, write_config

from moetrain import checkpoint, cli
from moetrain.progress import LiveProgress, progress
from moetrain.saying import forget, say
from moetrain.sinks import read_metrics

pytestmark = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="no device here that is always full"
)

WAYS = ["full disk", "no reader"]


@contextmanager
def broken(way: str) -> Iterator[TextIO]:
    """A file that takes nothing."""
    if way == "full disk":
        with open("/dev/full", "w") as file:
            yield file
        return
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        yield file


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_nobody_hears_trains_to_its_end(tmp_path, way):
    config = write_config(tmp_path, checkpoint={"every": 4}, train={"steps": 8, "warmup_steps": 99})
    with broken(way) as file, redirect_stdout(file), redirect_stderr(file):
        assert train(config) == 0
    run = tmp_path / "runs" / "run"
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == list(range(1, 9))
    assert checkpoint.latest(run) == run / "checkpoints" / "step-00000008"


def test_a_live_view_outlives_its_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    window, terminal = os.openpty()
    with os.fdopen(terminal, "w") as file, redirect_stdout(file):
        with progress(8, has_experts=False) as view:
            assert isinstance(view, LiveProgress)
            os.close(window)
            for step in range(3):
                view.update({"step": step})
                view.note("a word")
            assert not view._console._buffer, "what is lost is not kept"
        with pytest.raises(OSError, match="Input/output error"):
            file.write("x" * 9999)
        forget(file)


@pytest.mark.parametrize(("way", "code"), [("full disk", 1), ("no reader", 141)])
def test_help_that_is_lost_is_like_any_answer(way, code):
    with broken(way) as file, redirect_stdout(file):
        assert cli.main(["--help"]) == code


def test_without_standard_error_nothing_goes_to_standard_output(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    say("a warning")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("way", "code"), [("full disk", 1), ("no reader", 141)])
def test_a_command_whose_answer_is_lost_says_so_unless_its_reader_left(tmp_path, capfd, way, code):
    config = write_config(tmp_path)
    with broken(way) as file, redirect_stdout(file):
        assert cli.main(["check", str(config), "--world-size", "1"]) == code
    said = capfd.readouterr().err.replace("\n", "")
    full = "moetrain: error: standard output cannot be written: No space left on device"
    assert said == (full if way == "full disk" else "")


@pytest.mark.parametrize("way", WAYS)
def test_a_mistake_that_cannot_be_told_has_its_exit_code(tmp_path, way):
    with broken(way) as file, redirect_stderr(file):
        assert cli.main(["train", str(tmp_path / "missing.yaml")]) == 2


SECOND_SIGNAL = """
import os, signal, time
from moetrain import stopping
stopping.ECHO_S = 0
with stopping.StopSignals(saves=True) as signals:
    signals.defer()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    time.sleep(60)
"""


def test_a_second_signal_that_cannot_be_told_ends_the_process_all_the_same():
    with broken("no reader") as file:
        ended = subprocess.run([sys.executable, "-c", SECOND_SIGNAL], stderr=file, timeout=50)
    assert ended.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_python_does_not_change_the_exit_code_at_the_end(tmp_path, unbuffered):
    config = write_config(tmp_path)
    command = [sys.executable, "-m", "moetrain", "check", str(config), "--world-size", "1"]
    with broken("no reader") as file:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        ended = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, env=environment)
    assert (ended.returncode, ended.stderr) == (141, b"")
