"""The watchdog: a run that hangs ends in bounded time, and says which rank lags and where.

Every rank leaves a sign of life in the store of the process group, every few seconds and from a
thread: how far it has come, how many collectives it has begun, and where its main thread stands.
Rank 0 reads those of all ranks, the others that of rank 0. Who finds a rank silent, or itself
without progress, for as long as the limit, reports it; then every rank ends itself. A rank that
cannot reach the store for so long ends, too.

In a hang all ranks but the guilty one wait for each other. The guilty one gives no sign of life
(stopped, its host gone), or it has begun fewer collectives than the others.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self, final

import torch.distributed as dist

from moetrain.failure import FAILED, is_watched, record
from moetrain.mesh import collectives_begun
from moetrain.saying import say

STACKS_FILE = "stacks.txt"
MAX_INTERVAL_S = 10.0
PATIENCE_S = 3.0
"""How long a rank that hears of another's failure waits for its own main thread to fail of it."""


class Watch(Protocol):
    """What a run tells of its progress."""

    def mark(self, doing: str) -> None:
        """Progress: this rank begins something that takes less than the limit."""
        ...

    def rest(self, doing: str) -> None:
        """This rank begins something that may take any time."""
        ...


@final
class _Unwatched:
    def mark(self, doing: str) -> None: ...

    def rest(self, doing: str) -> None: ...


UNWATCHED: Watch = _Unwatched()
"""For a run that nobody watches."""


class Sign(NamedTuple):
    """A sign of life of one rank."""

    number: int
    """Signs so far; 0 is the last one of a rank that has ended well."""
    progress: int
    """Marks so far."""
    doing: str
    collectives: int
    """Collectives begun, in all of its groups."""
    stack: str
    """Where its main thread stands."""


@final
class Watchdog:
    """Watches over one rank of a run and, from rank 0, over all; a context manager.

    `mark` tells it of progress. It is idle until the first mark.
    """

    def __init__(self, store: dist.Store, folder: Path, limit_s: float) -> None:
        """Join those of the other ranks; a collective.

        Args:
            store: shared by the ranks, as `torch.distributed.Store`; it is cloned.
            folder: where the stacks of all ranks are written, as stacks.txt.
            limit_s: seconds without progress or sign of life.
        """
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._folder, self._limit_s = folder, limit_s
        self._interval_s = min(limit_s / 10, MAX_INTERVAL_S)
        # A connection of its own: on a shared one it would wait for what others ask. And names of
        # its own: the store may outlive a restart.
        names = [uuid.uuid4().hex]
        dist.broadcast_object_list(names)
        self._store = dist.PrefixStore(f"watchdog-{names[0]}", store.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=limit_s))
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._progress, self._doing, self._moved = 0, "starting", float("inf")
        self._number = 0
        now = time.monotonic()
        self._answered = now
        self._heard: dict[int, tuple[int, float]] = dict.fromkeys(self._watched(), (0, now))

    def mark(self, doing: str) -> None:
        """See `Watch`."""
        self._progress, self._doing, self._moved = self._progress + 1, doing, time.monotonic()

    def rest(self, doing: str) -> None:
        """See `Watch`; signs of life are still wanted."""
        self._doing, self._moved = doing, float("inf")

    def __enter__(self) -> Self:
        self._main = threading.current_thread()
        for work in (self._talk, self._guard):
            threading.Thread(target=work, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        # In a thread, because the store may be gone and never answer.
        farewell = threading.Thread(target=self._leave_word, args=(error is None,), daemon=True)
        farewell.start()
        farewell.join(PATIENCE_S)

    def _leave_word(self, ended_well: bool) -> None:
        with suppress(RuntimeError):  # the store has ended before this rank
            if ended_well:
                self._sign(last=True)
            else:
                self._tell(f"rank {self._rank} failed")

    # ---- its threads

    def _talk(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                self._sign()
                self._listen()
            except dist.DistNetworkError as error:  # for good: the store and its host are gone
                self._ended.wait(PATIENCE_S)
                self._leave(f"rank {self._rank} ends: the store of the run is gone: {error}")
            except RuntimeError:
                continue  # no answer: `_guard` waits no longer than the limit for one
            self._answered = time.monotonic()

    def _guard(self) -> None:
        while not self._ended.wait(self._interval_s):
            if time.monotonic() - self._answered > self._limit_s + self._interval_s:
                verdict = (
                    f"rank {self._rank} has had no answer from the store of the run for "
                    f"{self._limit_s:g} s: {_holder()} is gone or stopped, or the network is cut"
                )
                # Where this one stands is all that it can tell; the disk may hang, too.
                path = self._folder / STACKS_FILE.replace(".", f"-{self._rank}.")
                told = verdict, {self._rank: self._look()}, [self._rank]
                writing = threading.Thread(target=_write, args=(path, *told), daemon=True)
                writing.start()
                writing.join(PATIENCE_S)
                self._end(verdict)

    def _listen(self) -> None:
        if self._store.check(["verdict"]):
            self._ended.wait(PATIENCE_S)
            self._leave(f"rank {self._rank} ends: {self._store.get('verdict').decode()}")
        now = time.monotonic()
        for rank, sign in self._signs(self._watched()).items():
            number, _ = self._heard[rank]
            if sign.number != number or sign.number == 0:
                self._heard[rank] = sign.number, now
        quiet_s = now - min(self._moved, *(when for _, when in self._heard.values()))
        if quiet_s > self._limit_s:
            self._report()
        if quiet_s > 2 * self._limit_s:
            self._end(f"rank {self._rank} ends: the run hangs, and no rank could tell why")

    def _report(self) -> None:
        """One of the ranks that notice says what all of them are doing, and ends the run."""
        if self._store.compare_set("reporter", "", str(self._rank)) != str(self._rank).encode():
            return
        everyone = range(self._world)
        before = self._signs(everyone)
        self._ended.wait(2.5 * self._interval_s)
        self._sign()
        now = self._signs(everyone)
        silent = [
            rank
            for rank in everyone
            if rank != self._rank and _number(now, rank) == _number(before, rank) != 0
        ]
        verdict = f"{_guilty(now, silent)}; where every rank stands: {self._folder / STACKS_FILE}"
        self._tell(verdict)
        _write(self._folder / STACKS_FILE, verdict, now, everyone)  # the disk may hang, too
        self._end(verdict)

    # ---- what is in the store

    def _watched(self) -> range:
        return range(self._world) if self._rank == 0 else range(1)

    def _sign(self, last: bool = False) -> None:
        self._number += 1
        sign = self._look()
        with self._lock:  # nothing after the last one
            if last or not self._ended.is_set():
                sign = sign._replace(number=0) if last else sign
                self._store.set(f"sign/{self._rank}", json.dumps(sign))

    def _look(self) -> Sign:
        """Where this rank stands."""
        stack = traceback.format_stack(sys._current_frames().get(self._main.ident or 0))
        begun = collectives_begun()
        return Sign(self._number, self._progress, self._doing, begun, "".join(stack))

    def _signs(self, ranks: range) -> dict[int, Sign]:
        """The last sign of every rank that ever gave one."""
        there = [rank for rank in ranks if self._store.check([f"sign/{rank}"])]
        texts = self._store.multi_get([f"sign/{rank}" for rank in there])
        return {rank: Sign(*json.loads(text)) for rank, text in zip(there, texts, strict=True)}

    def _tell(self, verdict: str) -> None:
        """Tell the other ranks why the run ends; the first word counts."""
        self._store.compare_set("verdict", "", verdict)

    # ---- the end

    def _end(self, why: str) -> None:
        record(why, "hang")
        self._leave("" if is_watched() else f"moetrain: error: {why}")

    def _leave(self, why: str) -> None:
        if self._ended.is_set():
            return
        if why:
            say(why)
        os._exit(FAILED)


def _number(signs: dict[int, Sign], rank: int) -> int:
    return signs[rank].number if rank in signs else -1


def _guilty(signs: dict[int, Sign], silent: list[int]) -> str:
    """Who holds the others up, in words."""
    if silent:
        places = [f"rank {rank}{_last_seen(signs, rank)}" for rank in silent]
        return f"{', '.join(places)}: no sign of life (stopped, or its host is gone)"
    waiting = {rank: sign for rank, sign in signs.items() if sign.number}
    least = min((sign.progress, sign.collectives) for sign in waiting.values())
    behind = [r for r, sign in waiting.items() if (sign.progress, sign.collectives) == least]
    if len(behind) == len(waiting):
        return "no rank makes progress, and none is behind the others"
    lags = [f"rank {rank} ({waiting[rank].doing}) lags" for rank in behind]
    return f"{', '.join(lags)} behind the others, after {least[1]} collectives"


def _last_seen(signs: dict[int, Sign], rank: int) -> str:
    return f" (last at: {signs[rank].doing})" if rank in signs else ""


def _holder() -> str:
    """Who keeps the store: the launcher's agent, or rank 0 itself where nodes come and go."""
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return "the node that holds it" if is_agents else "rank 0, which holds it,"


def _write(path: Path, verdict: str, signs: dict[int, Sign], ranks: Iterable[int]) -> None:
    parts = [f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {verdict}\n"]
    parts += [f"rank {rank}: {_standing(signs.get(rank))}" for rank in ranks]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(parts))
    except OSError as error:
        say(f"moetrain: warning: {path} was not written: {error}")


def _standing(sign: Sign | None) -> str:
    if sign is None:
        return "gave no sign of life\n"
    if not sign.number:
        return "had ended\n"
    return f"{sign.doing}, {sign.collectives} collectives begun, last known stack:\n{sign.stack}"
