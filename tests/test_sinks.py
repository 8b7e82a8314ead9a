import json
import math
import os
import signal
import subprocess
import sys

import pytest

from moetrain.sinks import METRICS_FILE, MetricsLog, encode, read_metrics


def write_lines(run_dir, steps):
    log = MetricsLog(run_dir, resume_step=0)
    for step in steps:
        log.write({"step": step, "loss": 1 / step})
    log.close()


def steps_of(run_dir):
    return [line["step"] for line in read_metrics(run_dir)]


def test_lines_are_on_disk_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path / "new" / "run", resume_step=0)
    log.write({"step": 1, "layers": [{"load": [3, 4]}]})
    assert read_metrics(tmp_path / "new" / "run") == [{"step": 1, "layers": [{"load": [3, 4]}]}]
    log.close()


def test_nan_and_infinity_become_null_at_every_depth():
    line = {"step": 1, "loss": math.nan, "layers": [{"rate": math.inf, "load": [1, -math.inf]}]}
    assert json.loads(encode(line)) == {
        "step": 1,
        "loss": None,
        "layers": [{"rate": None, "load": [1, None]}],
    }


def test_big_integers_are_written_exactly():
    assert json.loads(encode({"step": 1, "load": [2**53 + 1]}))["load"] == [2**53 + 1]


def test_a_resumed_run_takes_up_after_its_checkpoint(tmp_path):
    write_lines(tmp_path, [10, 20, 30, 40])
    log = MetricsLog(tmp_path, resume_step=20)
    log.write({"step": 30, "loss": 0.5})
    log.close()
    assert read_metrics(tmp_path)[1:] == [{"step": 20, "loss": 0.05}, {"step": 30, "loss": 0.5}]
    assert steps_of(tmp_path) == [10, 20, 30]
    assert os.listdir(tmp_path) == [METRICS_FILE]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    write_lines(tmp_path, [10, 20])
    MetricsLog(tmp_path, resume_step=0).close()
    assert read_metrics(tmp_path) == []


def test_every_cut_through_the_last_line_loses_that_line_alone(tmp_path, caplog):
    write_lines(tmp_path, [1, 2])
    whole = (tmp_path / METRICS_FILE).read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first + 1, len(whole)):
        (tmp_path / METRICS_FILE).write_bytes(whole[:end])
        caplog.clear()
        assert steps_of(tmp_path) == [1]
        log = MetricsLog(tmp_path, resume_step=2)
        log.write({"step": 2})
        log.close()
        assert steps_of(tmp_path) == [1, 2]
        assert len(caplog.records) == 1
        assert "line 2" in caplog.text


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00garbage\n", b'["step", 1]\n', b'{"loss": 1}\n'])
def test_damage_in_the_middle_is_passed_over(tmp_path, damage):
    write_lines(tmp_path, [1])
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(damage + b'{"step": 2}\n')
    assert steps_of(tmp_path) == [1, 2]
    MetricsLog(tmp_path, resume_step=2).close()
    assert (tmp_path / METRICS_FILE).read_bytes().count(b"\n") == 2


WRITER = """
import sys
from pathlib import Path
from moetrain.sinks import MetricsLog
log = MetricsLog(Path(sys.argv[1]), resume_step=0)
step = 0
while True:
    step += 1
    log.write({"step": step, "load": list(range(3000))})
    print(step, flush=True)
"""


def test_kill_9_loses_no_line_that_was_written(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        reported = [int(writer.stdout.readline()) for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        reported += [int(text) for text in writer.stdout.readlines() if text.endswith("\n")]
    steps = steps_of(tmp_path)
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= reported[-1]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from moetrain.sinks import MetricsLog
log = MetricsLog(Path(sys.argv[1]), 0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, -1))
for step in range(1, 9):
    if step == int(sys.argv[2]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    log.write({"step": step, "load": [7] * 500})
log.close()
"""


@pytest.mark.parametrize(("room_at", "written"), [(7, 8), (9, 3)])
def test_lines_wait_for_room_on_the_disk(tmp_path, room_at, written):
    """The system takes 5000 bytes, which cuts the fourth line, and all from `room_at` on."""
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(room_at)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("waits for room: File too large") == 1
    assert ("has lost its last lines" in done.stderr) == (written < 8)
    assert steps_of(tmp_path) == list(range(1, written + 1))
    MetricsLog(tmp_path, resume_step=3).close()
    assert steps_of(tmp_path) == [1, 2, 3]


def test_an_evaluation_that_is_made_again_is_dropped(tmp_path):
    """One that a kill left behind, after the checkpoint that owes it."""
    log = MetricsLog(tmp_path, 0)
    for line in ({"step": 3, "loss": 1.0}, {"step": 3, "eval_loss": 1.0}, {"step": 4, "loss": 1.0}):
        log.write(line)
    log.close()
    MetricsLog(tmp_path, resume_step=3).close()
    assert len(read_metrics(tmp_path)) == 2
    MetricsLog(tmp_path, resume_step=3, owes_evaluation=True).close()
    assert read_metrics(tmp_path) == [{"step": 3, "loss": 1.0}]
