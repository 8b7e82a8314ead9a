"""What a save costs training: the quickstart's model, saved asynchronously, blocking, and not.

    python benchmarks/checkpoint.py [--rounds 12] [--steps 4]

Two processes share the experts, as launch/quickstart.sh trains. In one run the three ways take
turns: a save, or none, and some steps. *Blocked* is the time inside the call that saves, on the
rank that it held up longest. Steps *beside* a save begin before the checkpoint has its name. All
are ratios to the median step of the same round's turn without a save. Writes checkpoint.{json,md}
into results/; exit code 1 where an asynchronous save blocks training for LIMIT of a step or more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import harness
import record
import torch

from moetrain import settings
from moetrain.checkpoint import Saver
from moetrain.checkpoint.folder import FOLDER
from moetrain.mesh import Mesh
from moetrain.step import Position, Run, train_step
from moetrain.testing import run_ranks
from moetrain.train import set_up

CONFIG = "configs/quickstart.yaml"
RANKS = 2
LIMIT = 0.05
NONE, ASYNCHRONOUS, BLOCKING = WAYS = ("none", "asynchronous", "blocking")


class Turn(NamedTuple):
    """A save, or none, and the steps after it, in seconds."""

    blocked: float
    beside: list[float]
    """Steps that began before the save was through."""
    later: list[float]
    """The others."""


Round = dict[str, Turn]
"""A turn of every way."""


def main() -> None:
    parser = argparse.ArgumentParser(description="What a save costs training.")
    parser.add_argument("--rounds", type=int, default=12, help="saves of each way")
    parser.add_argument("--steps", type=int, default=4, help="steps after each")
    options = parser.parse_args()
    harness.require_at_least(parser, options, rounds=1, steps=1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = Path(folder), options.rounds, options.steps
        by_rank = run_ranks(RANKS, measure, *arguments, timeout=3600)
    rounds = [ratios(together(*ranks)) for ranks in zip(*by_rank, strict=True)]
    data = {"config": CONFIG, **vars(options), "limit": LIMIT}
    kept = [{way: turn._asdict() for way, turn in turns.items()} for turns in rounds]
    print(record.write("checkpoint", {**data, "rounds_of_ratios": kept}, report(rounds)))
    if (share := statistics.median(turns[ASYNCHRONOUS].blocked for turns in rounds)) >= LIMIT:
        raise SystemExit(
            f"an asynchronous save blocks {share:.1%} of a step, not below {LIMIT:.0%}"
        )


# ---- on every rank -------------------------------------------------------------------------------


def measure(folder: Path, rounds: int, steps: int) -> list[Round]:
    """Train, and save in turn; what this rank saw. The first round, in which memory is allocated,
    does not count."""
    config = settings.load(record.ROOT / CONFIG)
    run = set_up(config, folder, Mesh(torch.device("cpu"), config.parallel.ep))
    savers = {
        way: Saver(folder / way, keep=1, asynchronous=way == ASYNCHRONOUS) for way in WAYS[1:]
    }
    found, done = [], 0
    for number in range(rounds + 1):
        seen: Round = {}
        for way in harness.turns(WAYS, number):
            seen[way] = take_turn(run, savers.get(way), folder / way, done, steps)
            done += steps
        found.append(seen)
    return found[1:]


def take_turn(run: Run, saver: Saver | None, folder: Path, done: int, steps: int) -> Turn:
    """Save the run as it is after `done` steps, train for some more."""
    turn = Turn(save(run, saver, done) if saver else 0.0, [], [])
    checkpoint = folder / FOLDER / f"step-{done:08d}"
    for step in range(done, done + steps):
        is_writing = saver is not None and not checkpoint.exists()
        started = time.perf_counter()
        train_step(run, position(run, step))
        (turn.beside if is_writing else turn.later).append(time.perf_counter() - started)
    if saver:
        saver.wait()
    return turn


def save(run: Run, saver: Saver, done: int) -> float:
    """Seconds for which the call holds up training."""
    started = time.perf_counter()
    saver.save(done, run.engine.state(), {"position": asdict(position(run, done))})
    return time.perf_counter() - started


def position(run: Run, step: int) -> Position:
    """Where a run stands after so many steps."""
    samples = step * run.config.train.global_batch
    return Position(step, samples, samples * run.config.data.seq_len)


# ---- of all ranks --------------------------------------------------------------------------------


def together(*ranks: Round) -> Round:
    """All ranks' round: blocked as long as the slowest; steps, which they do together, as rank 0
    saw them."""
    return {
        way: ranks[0][way]._replace(blocked=max(turns[way].blocked for turns in ranks))
        for way in WAYS
    }


def ratios(turns: Round) -> Round:
    """Seconds over the median step without a save."""
    unit = statistics.median(turns[NONE].later)
    return {
        way: Turn(blocked / unit, [step / unit for step in beside], [step / unit for step in later])
        for way, (blocked, beside, later) in turns.items()
    }


def report(rounds: list[Round]) -> str:
    rows = [
        [
            way,
            shown([turns[way].blocked for turns in rounds], ".1%") if way != NONE else "",
            shown([step for turns in rounds for step in turns[way].beside]),
            shown([step for turns in rounds for step in turns[way].later]),
            statistics.median(len(turns[way].beside) for turns in rounds),
        ]
        for way in WAYS
    ]
    header = [
        "save",
        "blocked / step",
        "step beside it / step",
        "later step / step",
        "steps beside",
    ]
    return "\n".join(
        [
            "# What a save costs training",
            "",
            f"`{CONFIG}`, {RANKS} ranks, {len(rounds)} saves of each way, in turn within one run. "
            "Ratios to the median step of the same round without a save; median (least–most).",
            "",
            record.table(header, rows),
            "",
            "*Blocked*: inside the call that saves, on the rank that it held up longest. *Beside*: "
            "steps that begin before the checkpoint has its name; the last column is the median "
            "number of them per save. The ranks write with the cores that they compute with.",
        ]
    )


def shown(values: list[float], form: str = ".2f") -> str:
    """Median and range, if there is any."""
    return harness.spread(values).show(form) if values else ""


if __name__ == "__main__":
    main()
