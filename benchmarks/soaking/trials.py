"""A trial: the ranks of a run are started, and killed at the moment that was planned."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import closing, suppress
from pathlib import Path
from signal import SIGKILL
from typing import NamedTuple, TextIO, final

from moetrain.checkpoint.folder import FOLDER

from .checks import SoakError, committed_steps
from .plans import Kill, Phase, Plan, Target
from .starts import Forked, Launched, Start

OUTPUT = "output"
"""What the ranks of a start say, beside their journals."""
POLL_S = 0.005
LIMIT_S = 300.0
"""How long one start may take."""
BEGUN_BY: dict[str, Phase] = {"loaded": "start-up", "evaluate": "evaluation"}
"""Phases by the event of a journal; every other event is a step's."""


class Strike(NamedTuple):
    """A signal that was sent."""

    signal: signal.Signals
    target: Target
    phase: Phase
    """What rank 0 was doing, whatever was aimed at."""
    committed: int
    """The newest step that was committed then, 0 for none."""

    def __str__(self) -> str:
        return f"{self.signal.name} to {self.target}"

    @property
    def is_kill(self) -> bool:
        """Whether nobody can answer it."""
        return self.signal == SIGKILL

    @property
    def stops(self) -> bool:
        """Whether the run can answer by a save: it was training, and the signal can be caught."""
        return not self.is_kill and self.phase != "start-up"


class Trial(NamedTuple):
    """A start that has ended."""

    code: int
    """As the launcher counts: 0 where the run is through."""
    strike: Strike | None
    """None where the run was through before the moment planned."""


def trial(config: Path, plan: Plan, journals: Path) -> Trial:
    """Start or continue the run of a configuration, kill it as planned, wait for all to end.

    `journals` is an empty folder. Raises SoakError where ranks have not ended after LIMIT_S.
    """
    layout, launched, kill = plan
    run = config.parent / "run"
    watch = Watch(run, journals)
    way = Launched if launched else Forked
    args = ["train", str(config), *layout.flags()]
    (journals / OUTPUT).touch()
    start: Start = way(layout.ranks, args, journals, journals / OUTPUT)
    strike, deadline = None, time.monotonic() + LIMIT_S
    with closing(start), closing(watch):
        while (code := start.poll()) is None:
            phase = watch.look()
            if kill and not strike and phase == kill.phase and watch.begun >= kill.steps:
                time.sleep(kill.delay)
                phase, committed = watch.look(), newest(run)
                strike = Strike(kill.signal, _send(start, kill), phase, committed)
            if time.monotonic() > deadline:
                raise SoakError(f"ranks have not ended after {LIMIT_S:.0f} s: {journals}")
            time.sleep(POLL_S)
    return Trial(code, strike)


def newest(run: Path) -> int:
    """The newest step committed; 0 for none."""
    return max(committed_steps(run), default=0)


def _send(start: Start, kill: Kill) -> Target:
    """Send the signal; returns to whom: the launcher has it where there are no ranks yet."""
    pids, target = start.ranks(), kill.target
    if target == "one rank":
        pids = pids[-1 - kill.rank % max(1, len(pids)) :][:1]
    if start.agent and (target == "launcher" or not pids):
        pids, target = [start.agent], "launcher"
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, kill.signal)
    return target


@final
class Watch:
    """What a start is doing, by rank 0's journal and the run's folder."""

    def __init__(self, run: Path, journals: Path) -> None:
        self._checkpoints, self._journal = run / FOLDER, journals / "rank-0.jsonl"
        self._since = time.time_ns()
        self._file: TextIO | None = None
        self._rest = ""
        self._last: Phase = "start-up"
        self.begun = 0
        """Steps."""

    def look(self) -> Phase:
        """The phase it is in."""
        if self._file is None and self._journal.exists():
            self._file = self._journal.open(encoding="utf-8")
        if self._file:
            *lines, self._rest = (self._rest + self._file.read()).split("\n")
            for line in lines:
                event = json.loads(line)["event"]
                self.begun += event == "begin"
                self._last = BEGUN_BY.get(event, "step")
        return "save" if self.begun and self._is_saving() else self._last

    def _is_saving(self) -> bool:
        for partial in self._checkpoints.glob("*.partial"):
            with suppress(FileNotFoundError):
                # One that a killed start left has not been written to since.
                if partial.stat().st_mtime_ns >= self._since:
                    return True
        return False

    def close(self) -> None:
        """Close the journal."""
        if self._file:
            self._file.close()
