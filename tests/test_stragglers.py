"""Who is slow, by times made up and by a rank that really is."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import without_pictures, write_config

from moetrain import settings
from moetrain.data import Batch, Samples
from moetrain.mesh import Mesh
from moetrain.sinks import read_metrics
from moetrain.stragglers import RankClock, RankTimes, Streaks, slow_ranks
from moetrain.testing import simulate_ranks
from moetrain.train import set_up
from moetrain.train import train as train_run

EVEN = [0.01] * 4


@pytest.mark.parametrize(
    ("data_s", "probe_s", "found"),
    [
        (EVEN, EVEN, {}),
        (EVEN, [0.010, 0.015, 0.009, 0.012], {}),
        (EVEN, [0.010, 0.021, 0.009, 0.010], {1: "a matrix product takes it 21 ms, others 10 ms"}),
        ([0.3, 0.1, 0.1, 0.1], EVEN, {0: "it reads its batches for 0.3 s of a step's 1 s"}),
        # many times the median, but nothing of a step
        ([0.09, 0.001, 0.001, 0.001], EVEN, {}),
        # half of the ranks: their files are on the slow disk
        ([0.9, 0.1, 0.1, 0.9], EVEN, {0: "it reads", 3: "it reads"}),
        # of two ranks the faster one is what is usual
        ([0.1, 0.3], [0.01, 0.01], {1: "it reads"}),
        ([0.1, 0.1], [0.02, 0.01], {0: "a matrix product"}),
        ([0.7], [], {}),
        # a rank whose core is shared reads slowly, too: where it matters, reading is what is said
        ([0.4, 0.1, 0.1, 0.1], [0.02, 0.01, 0.01, 0.01], {0: "it reads"}),
    ],
)  # fmt: skip
def test_slow_is_beyond_the_median_by_enough_to_matter(data_s, probe_s, found) -> None:
    slow = slow_ranks(RankTimes([1.0] * len(data_s), data_s, probe_s), step_time_s=1.0)
    assert slow.keys() == found.keys()
    for rank, why in found.items():
        assert slow[rank].startswith(why)


def test_a_note_after_three_lines_in_a_row_and_once_a_row() -> None:
    streaks = Streaks()
    lines = [{1, 2}, {1}, {1, 2}, {1, 2}, {2}, {1}, {1}, {1}, set(), {1}]
    notes = [streaks.notes(dict.fromkeys(slow, "why")) for slow in lines]
    assert [[note[:6] for note in of_line] for of_line in notes] == [
        [], [], ["rank 1"], [], ["rank 2"], [], [], ["rank 1"], [], [],
    ]  # fmt: skip
    assert notes[2] == ["rank 1 is slow: why"]


def test_all_ranks_have_the_times_of_all() -> None:
    def work() -> RankTimes:
        clock = RankClock(Mesh(torch.device("cpu")))
        return clock.times(1.0 + dist.get_rank(), 0.1 * dist.get_rank())

    ranks = simulate_ranks(3, work)
    assert ranks[0] == ranks[1] == ranks[2]
    assert ranks[0].step_s == [1, 2, 3]
    assert ranks[0].data_s == [0, 0.1, 0.2]
    assert len(ranks[0].probe_s) == 3
    assert all(seconds > 0 for seconds in ranks[0].probe_s)
    assert simulate_ranks(1, work) == [RankTimes([1], [0], [])], "nobody to be compared with"


PROBING = """
import os, time
import torch
from moetrain.stragglers import PRODUCTS, Probe
torch.set_num_threads(1)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
probe = Probe(torch.device("cpu"))
for _ in range(8):
    if os.fork() == 0:
        while True:
            pass
time.sleep(0.1)
before = time.process_time()
seconds = probe.seconds()
print(seconds, (time.process_time() - before) / PRODUCTS, flush=True)
time.sleep(60)
"""


def test_a_rank_that_has_little_of_its_core_is_told_by_the_probe() -> None:
    command = [sys.executable, "-c", PROBING]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout
    try:
        starved, usual = map(float, process.stdout.readline().split())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    # On a core of its own it would take the time that it computes.
    slow = slow_ranks(RankTimes([1.0] * 3, [0.0] * 3, [usual, starved, usual]), step_time_s=1.0)
    assert slow.keys() == {1}


class SlowReading:
    """Samples that take as long to read as all that was done since they were last read."""

    def __init__(self, samples: Samples):
        self.samples, self.last = samples, time.perf_counter()

    def batch(self, indices: Sequence[int]) -> Batch:
        """See `Samples`."""
        time.sleep(time.perf_counter() - self.last + 0.02)
        self.last = time.perf_counter()
        return self.samples.batch(indices)


def test_a_rank_that_reads_slowly_is_named(tmp_path, capsys):
    config = write_config(tmp_path, train={"steps": 4}, eval={"every": 0}, checkpoint={"every": 0})
    made = settings.load(config)

    def of_rank() -> None:
        run = set_up(made, made.out / made.name, Mesh(torch.device("cpu")))
        slow: Any = SlowReading(run.samples) if run.mesh.rank == 2 else run.samples
        train_run(dataclasses.replace(run, samples=slow))

    with without_pictures():
        simulate_ranks(4, of_rank)
    for line in read_metrics(made.out / made.name):
        assert line["data_s_by_rank"][2] == max(line["data_s_by_rank"]) > 0
        assert len(line["probe_s_by_rank"]) == 4
    assert capsys.readouterr().out.count("rank 2 is slow: it reads its batches for ") == 1
