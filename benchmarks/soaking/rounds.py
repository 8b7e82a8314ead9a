"""A round: one run, killed and resumed until it is through, then held to one that never was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, final

from moetrain.stopping import STOPPED

from . import checks
from .checks import BAND, TOLERANCE, History, SoakError, Tensors, require
from .plans import BATCH, HOME, Kind, Layout, Phase, Plan, write_config
from .trials import OUTPUT, Trial, newest, trial


@dataclass
class Tally:
    """What was done, and how often what was checked held."""

    kills: Counter[tuple[str, Phase]] = field(default_factory=Counter)
    """By signal and target, and by what rank 0 was doing."""
    starts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By layout and by way."""
    resumes: int = 0
    moves: int = 0
    """Resumes elsewhere than where the checkpoint was saved."""
    lost: list[int] = field(default_factory=list)
    """Of every kill after start-up, the steps begun that the next start did again."""
    rounds: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    """Of the runs that came through."""
    checked: Counter[str] = field(default_factory=Counter)
    gaps: dict[str, float] = field(default_factory=dict)
    """Nats that a loss was away from the uninterrupted run's, at most, by kind of round."""


class Whole(NamedTuple):
    """The run that is never killed."""

    run: Path
    history: History


def uninterrupted(folder: Path, kind: Kind, router: str, steps: int) -> Whole:
    """Train it, with one start."""
    config, journals = write_config(folder, kind, router, steps), folder / "start"
    journals.mkdir()
    if trial(config, Plan(HOME), journals).code != 0:
        raise SoakError(f"the uninterrupted run failed:\n{_last_words(journals)}")
    return Whole(folder / "run", checks.samples_by_step(checks.read_journals(journals)))


@final
class Round:
    """One run that is killed and resumed."""

    def __init__(self, folder: Path, kind: Kind, router: str, steps: int, tally: Tally) -> None:
        self._config = write_config(folder, kind, router, steps)
        self._folder, self._run = folder, folder / "run"
        self._kind, self._steps, self._tally = kind, steps, tally
        self._history: History = {}
        self._saved_at: Layout | None = None
        self._starts = 0

    def soak(self, plans: Iterable[Plan], whole: Whole) -> None:
        """Kill and resume as planned until the run is through, and compare it. Raises SoakError for
        whatever is wrong, and where no plan lets it come through."""
        for plan in plans:
            if self._start(plan) == 0:
                self._compare(whole)
                self._tally.rounds[self._kind.name] += 1
                self._tally.steps += self._steps
                return
        raise SoakError("the plans end before the run is through")

    def _start(self, plan: Plan) -> int:
        """One start, checked once it has ended; returns its exit code."""
        step = newest(self._run)
        saved = checks.read_tensors(checks.checkpoint_of(self._run, step)) if step else {}
        self._starts += 1
        journals = self._folder / "starts" / f"{self._starts:03d}"
        journals.mkdir(parents=True)
        ended = trial(self._config, plan, journals)
        way = "launcher" if plan.launched else "fork"
        self._tally.starts[str(plan.layout), way] += 1
        self._check_start(ended, plan.layout, step, saved, journals)
        return ended.code

    def _check_start(
        self, ended: Trial, layout: Layout, step: int, saved: Tensors, journals: Path
    ) -> None:
        """`step` and `saved`: the newest checkpoint before the start, and what it held."""
        code, strike = ended
        if code != 0 and strike is None:
            said = _last_words(journals)
            raise SoakError(f"a start failed (exit code {code}) that nobody had killed:\n{said}")
        committed, checked = newest(self._run), self._tally.checked
        checked["committed checkpoints verified"] += checks.check_committed(self._run)
        had = max(step, strike.committed if strike else 0)
        require(committed >= had, f"of step {had}, which was committed, there is no checkpoint")

        events = checks.read_journals(journals)
        if tensors := checks.check_loaded(events, layout.ranks, step, saved):
            self._tally.resumes += 1
            self._tally.moves += layout != self._saved_at
            checked["tensors equal bit by bit once loaded"] += tensors
        trained = checks.samples_by_step(events)
        if trained:
            require(
                min(trained) == step + 1,
                f"step {step} was committed last, but training went on with {min(trained)}",
            )
            self._history = checks.continued(self._history, step, trained)
        if committed > step:
            self._saved_at = layout
        if code != 0 and strike:
            self._tally.kills[str(strike), strike.phase] += 1
            if trained:
                self._tally.lost.append(max(trained) - committed)
        if strike and strike.is_kill and code in (0, STOPPED) and committed < self._steps:
            raise SoakError(
                f"{strike} ended with exit code {code}, and the run is not through:\n"
                f"{_last_words(journals)}"
            )
        if strike and strike.stops:
            if committed != (last := max(trained, default=step)) or code not in (0, STOPPED):
                raise SoakError(
                    f"{strike} at step {last} ended with exit code {code} and step "
                    f"{committed} saved:\n{_last_words(journals)}"
                )
            checked["stops by a signal that lost nothing"] += 1

    def _compare(self, whole: Whole) -> None:
        """The run that came through, beside the uninterrupted one."""
        checked, run, equal = self._tally.checked, self._run, self._kind.equal
        checked["steps with the samples of the uninterrupted run"] += checks.check_samples(
            self._history, whole.history, self._steps, BATCH
        )
        checked["ledgers that add up"] += checks.check_ledgers(run, whole.run)
        gap = max(checks.loss_gaps(run, whole.run))
        self._tally.gaps[self._kind.name] = max(gap, self._tally.gaps.get(self._kind.name, 0))
        if equal == "band":
            checked[f"losses within {BAND} nats"] += checks.check_losses(run, whole.run, BAND)
            return
        tolerance = 0.0 if equal == "bits" else TOLERANCE
        how = "bit by bit" if equal == "bits" else f"to {TOLERANCE:g}"
        checked[f"lines of metrics equal {how}"] += checks.check_lines(run, whole.run, tolerance)
        found, wanted = (
            checks.read_tensors(checks.checkpoint_of(of, self._steps)) for of in (run, whole.run)
        )
        checked[f"tensors equal {how} at the end"] += checks.check_same_tensors(
            found, wanted, tolerance
        )


def _last_words(journals: Path) -> str:
    """The end of what the ranks said."""
    return "\n".join((journals / OUTPUT).read_text(errors="replace").splitlines()[-40:])
