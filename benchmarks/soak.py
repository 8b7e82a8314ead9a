"""Kill a small run at random moments, resume it anywhere, and hold it to one that was never killed.

    python benchmarks/soak.py --minutes 30 [--seed 0] [--steps 100]

Rounds of one run each take turns: at the same layout, where everything must be equal bit by bit; at
random layouts in fp64, to 1e-9; at random layouts and engines in fp32, within a band, because
rounding can flip a choice that is nearly a tie. Experts are spread over two to four processes on
the CPU. Ranks, all ranks or the launcher are killed while they start, step, evaluate or save. After
each kill every committed checkpoint must verify; after each resume every tensor must have the
bits that were saved; at the end no sample may be lost, repeated or out of order.

Writes soak.{json,md} into results/. Exit code 1 where something did not hold; the folder of the
runs is kept then, with what every rank did and said.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import harness
import record
from soaking.checks import BAND, TOLERANCE, SoakError
from soaking.plans import EVERY, KINDS, PHASES, ROUTERS, Plan, draws
from soaking.rounds import Round, Tally, Whole, uninterrupted
from soaking.starts import preload

KILLS = 10
"""At most in a round; whoever is killed too often never comes through."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill and resume a run at random, and compare.")
    parser.add_argument("--minutes", type=float, default=30, help="how long runs are killed")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes ({options.minutes:g}) must be above 0")
    harness.require_at_least(parser, options, steps=1)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {options.seed}, in {folder}", file=sys.stderr)
    try:
        tally = soak(folder, options.minutes, options.seed, options.steps)
    except SoakError as error:
        raise SystemExit(f"soak: {error}\n(seed {options.seed}; kept: {folder})") from None
    shutil.rmtree(folder)
    print(record.write("soak", {**vars(options), **numbers(tally)}, report(tally, options.minutes)))


def soak(folder: Path, minutes: float, seed: int, steps: int) -> Tally:
    """Rounds until the time is over; one that is under way then comes through without kills."""
    preload()
    tally, wholes = Tally(), dict[tuple[str, str], Whole]()
    deadline, number = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < deadline:
        kind, router = KINDS[number % len(KINDS)], ROUTERS[number % len(ROUTERS)]
        key = (kind.precision, router)
        if key not in wholes:
            wholes[key] = uninterrupted(folder / "-".join(key), kind, router, steps)
        place = folder / f"round-{number:03d}"
        planned = until(deadline, draws(random.Random(f"{seed} {number}"), kind.layouts))
        Round(place, kind, router, steps, tally).soak(planned, wholes[key])
        shutil.rmtree(place)
        print(
            f"round {number} ({kind.name}, {router}): {sum(tally.kills.values())} kills, "
            f"{tally.resumes} resumes so far",
            file=sys.stderr,
        )
        number += 1
    return tally


def until(deadline: float, planned: Iterator[Plan]) -> Iterator[Plan]:
    """The plans of a round: KILLS at most, none after the deadline, and then a start that lasts."""
    for plan in itertools.islice(planned, KILLS):
        if time.monotonic() >= deadline:
            break
        yield plan
    yield next(planned)._replace(kill=None)


def numbers(tally: Tally) -> dict[str, object]:
    """The tally as JSON holds it."""
    return {
        "rounds": tally.rounds,
        "kills": [[what, phase, count] for (what, phase), count in sorted(tally.kills.items())],
        "starts": [[layout, way, count] for (layout, way), count in sorted(tally.starts.items())],
        "resumes": tally.resumes,
        "moves": tally.moves,
        "steps": tally.steps,
        "steps_done_again": tally.lost,
        "checked": tally.checked,
        "largest_loss_gaps": tally.gaps,
    }


def report(tally: Tally, minutes: float) -> str:
    kills, lost = sum(tally.kills.values()), tally.lost or [0]
    layouts, ways = Counter[str](), Counter[str]()
    for (layout, way), count in tally.starts.items():
        layouts[layout] += count
        ways[way] += count
    through = [[kind, count, f"{tally.gaps[kind]:.1e}"] for kind, count in tally.rounds.items()]
    return "\n".join(
        [
            "# Killed and resumed",
            "",
            f"In {minutes:g} minutes {kills} kills, and {tally.resumes} resumes from a checkpoint, "
            f"{tally.moves} of them elsewhere than where it was saved. Nothing was lost but the "
            f"steps since the last committed checkpoint: {sum(lost)} were done again, of "
            f"{tally.steps} in all; a kill cost {statistics.median(lost):g} (median), at most "
            f"{max(lost)}, where every {EVERY}th step is saved.",
            "",
            record.table(["held", "times"], sorted(tally.checked.items())),
            "",
            f"In fp64, layouts agree to {TOLERANCE:g} in loss, ledger, weights and moments. In "
            "fp32 another layout or engine rounds otherwise and can flip a choice that is nearly a "
            f"tie; there the band is {BAND} nats, for every loss.",
            "",
            record.table(["what was killed", *PHASES], kills_by_phase(tally)),
            "",
            "By what rank 0 was doing. A start-up lasts until the first step: imports, process "
            "group, data, loading.",
            "",
            record.table(
                ["kind of run", "came through", "largest distance in loss, nats"], through
            ),
            "",
            record.table(["started at", "times"], sorted(layouts.items())),
            "",
            f"{ways['launcher']} starts by `python -m moetrain.torchrun`, {ways['fork']} as forks "
            "of a process that has imported everything.",
        ]
    )


def kills_by_phase(tally: Tally) -> list[list[object]]:
    """A row for every signal and target, a column for every phase."""
    whats = sorted({what for what, _ in tally.kills})
    return [[what, *(tally.kills[what, phase] for phase in PHASES)] for what in whats]


if __name__ == "__main__":
    main()
