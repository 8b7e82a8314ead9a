"""Contenders measured side by side: each ready in processes of its own, all of them in turn.

A benchmark names its contenders, builds a case in all of them, checks that they compute the same,
and measures rounds in which each has its turn, so that whatever disturbs the machine disturbs all.
What is compared is the ratio of two contenders within a round; a table shows the median and the
range of the rounds. A contender that cannot be built here is left out with its reason.

Processes of their own keep apart what cannot live together (two versions of a library) and tell
whose memory is whose. The same calls measure one process or several ranks, on CPUs or GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar, cast, get_args

import torch
import torch.distributed as dist

from moetrain.host_memory import keep_freed
from moetrain.precision import multiplies_bf16

T = TypeVar("T")
Device = Literal["cpu", "cuda"]
CLEAR_PEAK = Path("/proc/self/clear_refs")
"""Where Linux takes the order to measure a process's peak memory anew."""
GRACE_S = 10.0
"""That a process has to end."""
SCARCE = 0.6
"""Share of the memory below which contenders on CPUs give back what they keep, and warm up again:
all are there at a time."""


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, so that a command runs on a GPU where torch sees one, and on CPUs elsewhere."""
    parser.add_argument(
        "--device",
        type=_device,
        default="cuda" if _sees_gpu() else "cpu",
        metavar="{cpu,cuda}",
        help="usually cuda where torch sees a GPU",
    )


def _device(text: str) -> Device:
    if text == "cuda" and not _sees_gpu():
        raise argparse.ArgumentTypeError("cuda needs a GPU, and torch sees none; try cpu")
    if text not in get_args(Device):
        raise argparse.ArgumentTypeError(f"{text} is neither cpu nor cuda")
    return cast(Device, text)


def require_at_least(
    parser: argparse.ArgumentParser, options: argparse.Namespace, **least: int
) -> None:
    """End with a message where an option, by its name, is below its least value."""
    for name, value in least.items():
        if (given := getattr(options, name)) < value:
            parser.error(f"--{name.replace('_', '-')} ({given}) must be at least {value}")


def usual_dtype(device: Device) -> Literal["bf16", "fp32"]:
    """bf16 where the device has instructions for its products."""
    return "bf16" if multiplies_bf16(on_cpu=device == "cpu") else "fp32"


def _sees_gpu() -> bool:
    # Unlike `is_available` without waking the driver, which afterwards would not notice that a
    # process hides its GPUs from itself.
    return torch.cuda.device_count() > 0


class Case(Protocol):
    """Something ready to be measured, in every rank of a contender."""

    def step(self) -> object:
        """What is timed. Every call must do the same work."""
        ...

    def facts(self) -> Any:
        """What the benchmark wants to know of this rank: outputs to compare, counts. Picklable."""
        ...


class Contender(NamedTuple):
    """Whoever is measured, and where."""

    name: str
    build: Callable[[Any, torch.device], Case]
    """Makes a case ready; at the top level of a module, since other processes call it. Raises
    `AbsentError` where it cannot be done; any other error is one of the benchmark."""
    ranks: int = 1
    """Processes of one group (Gloo, NCCL on GPUs), which share the cores of this machine. A single
    one has its group, too."""
    first_on_path: Path | None = None
    """A folder of packages that go before those that are installed."""


class AbsentError(Exception):
    """A contender cannot take part, and why."""


class Sample(NamedTuple):
    """What a contender did, round by round."""

    seconds: list[float]
    """Per step, of its slowest rank."""
    peak_bytes: int
    """The most memory that a step took beyond what was there before it, of all its ranks together:
    of the process on a CPU, of torch's allocator on a GPU."""


def turns(contenders: Sequence[T], number: int) -> list[T]:
    """The order of a round: forwards and backwards, and after both another one begins."""
    first = number // 2 % max(1, len(contenders))
    order = [*contenders[first:], *contenders[:first]]
    return order[::-1] if number % 2 else order


class Field:
    """All contenders, each in its processes; a context manager."""

    def __init__(self, contenders: Sequence[Contender], device: Device = "cpu"):
        self._contenders, self.device = contenders, device
        self._stack = contextlib.ExitStack()
        self._teams: dict[str, list[Connection]] = {}
        self._ready: list[str] = []

    def __enter__(self) -> Self:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        for number, contender in enumerate(self._contenders):
            store = folder / f"store-{number}"
            self._teams[contender.name] = [
                self._start(contender, rank, store) for rank in range(contender.ranks)
            ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _start(self, contender: Contender, rank: int, store: Path) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = theirs, contender, rank, store, self.device
        process = context.Process(target=_serve, args=arguments, daemon=True)
        with _on_path(contender.first_on_path):
            process.start()
        theirs.close()
        self._stack.callback(_end, process)
        self._stack.callback(ours.close)  # first: it ends the process
        return ours

    def build(self, cell: Any) -> dict[str, list[Any] | AbsentError]:
        """Make the case of `cell` ready everywhere, in place of the one before.

        Returns every contender's facts, rank by rank, or why it is left out; those that are left
        out have no turns.
        """
        found: dict[str, list[Any] | AbsentError] = {}
        for name in self._teams:  # one at a time: building may take all memory there is
            answers = self._ask(name, "build", cell)
            reasons = [answer for answer in answers if isinstance(answer, AbsentError)]
            found[name] = reasons[0] if reasons else answers
        self._ready = [name for name, facts in found.items() if not isinstance(facts, AbsentError)]
        return found

    def facts(self) -> dict[str, list[Any]]:
        """What those that are ready now tell, rank by rank."""
        return {name: self._ask(name, "facts", None) for name in self._ready}

    def clear(self) -> None:
        """Let go of all cases, so that others have the memory; the next use is `build`."""
        for name in self._teams:
            self._ask(name, "clear", None)
        self._ready = []

    def measure(
        self,
        rounds: int,
        turn_s: float = 0.2,
        enough_s: float = math.inf,
        least: int = 3,
    ) -> dict[str, Sample]:
        """Let every contender that is ready have a turn in each of so many rounds.

        A turn is a step that is not counted and then as many as fill about `turn_s` seconds; or one
        step, where that takes longer, with the other before it only where the contender has given
        its memory back. Who begins and who follows whom changes from round to round.
        After `enough_s` seconds no round begins but the first `least` ones.
        """
        steps = {name: self._pace(name, turn_s) for name in self._ready}
        seconds: dict[str, list[float]] = {name: [] for name in self._ready}
        started = time.perf_counter()
        for number in range(rounds):
            if number >= least and time.perf_counter() - started > enough_s:
                break
            for name in turns(self._ready, number):
                seconds[name].append(self._turn(name, steps[name]))
        peaks = {name: sum(self._ask(name, "peak", None)) for name in self._ready}
        return {name: Sample(seconds[name], peaks[name]) for name in self._ready}

    def _pace(self, name: str, turn_s: float) -> int:
        """The steps of a turn, after warming up; 0 for a single one that is warm already."""
        slowest = self._turn(name, 0)
        if slowest < 10 * turn_s:  # the first one may have had to load and compile things
            slowest = self._turn(name, 0)
        return 0 if slowest > turn_s else max(1, round(turn_s / slowest))

    def _turn(self, name: str, steps: int) -> float:
        """Seconds per step of its slowest rank; the others give back what they keep first, where
        little memory is left."""
        if self.device == "cpu" and _available() < SCARCE:
            for other in self._ready:
                if other != name:
                    self._ask(other, "rest", None)
        return max(self._ask(name, "turn", steps))

    def _ask(self, name: str, what: str, argument: Any) -> list[Any]:
        """Let all ranks of a contender do something; their answers in the order of ranks."""
        team = self._teams[name]
        for rank, connection in enumerate(team):
            try:
                connection.send((what, argument))
            except ConnectionError:
                raise RuntimeError(
                    f"{name}: rank {rank} died before it was asked to {what}"
                ) from None
        answers: dict[int, Any] = {}
        while len(answers) < len(team):
            # Whoever answers first: where one has died, the others wait for it.
            (connection, *_) = wait([c for rank, c in enumerate(team) if rank not in answers])
            rank = team.index(cast(Connection, connection))
            try:
                answers[rank] = team[rank].recv()
            except (EOFError, ConnectionError):
                raise RuntimeError(f"{name}: rank {rank} died while asked to {what}") from None
            if isinstance(answers[rank], _Failure):
                raise RuntimeError(f"{name}, rank {rank}, asked to {what}:\n{answers[rank].trace}")
        return [answers[rank] for rank in range(len(team))]


def _end(process: BaseProcess) -> None:
    """Wait for a process whose connection is closed; one that waits for a dead rank is killed."""
    process.join(GRACE_S)
    if process.is_alive():
        process.kill()
        process.join()


# ---- in the processes of a contender -------------------------------------------------------------


class _Failure(NamedTuple):
    trace: str


def _serve(
    connection: Connection, contender: Contender, rank: int, store: Path, kind: Device
) -> None:
    """Answer until the connection closes."""
    torch.set_num_threads(max(1, _cores() // contender.ranks))
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed()  # for all alike: as training does, and without it large blocks cost the most
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=contender.ranks
    )
    case: Any = None
    gave_back = False
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            what, argument = connection.recv()
            answer: Any
            try:
                if what == "clear":
                    answer = case = None
                    _let_go(kind)
                elif what == "rest":
                    answer, gave_back = None, True
                    _let_go(kind)
                elif what == "build":
                    case, gave_back = None, False  # the one before makes room first
                    _let_go(kind)
                    case = contender.build(argument, device)
                    answer = case.facts()
                    _let_go(kind)  # others are built beside it
                elif what == "facts":
                    answer = case.facts()
                elif what == "turn":
                    answer = _turn(case, argument, kind, warms_up=gave_back or argument > 0)
                    gave_back = _give_back(kind)
                else:
                    answer = peak_bytes(case.step, kind)
                    _let_go(kind)  # what that took is more than all others can do without
            except AbsentError as reason:
                answer = reason
            except Exception:
                answer = _Failure(traceback.format_exc())
            connection.send(answer)


def _turn(case: Case, steps: int, kind: Device, warms_up: bool) -> float:
    """Mean seconds of `steps` steps, or of one where 0; after another that is not counted."""
    if warms_up:
        case.step()
    synchronize(kind)
    started = time.perf_counter()
    for _ in range(max(1, steps)):
        case.step()
    synchronize(kind)
    return (time.perf_counter() - started) / max(1, steps)


def _give_back(kind: Device) -> bool:
    """Give the kept memory to the contenders that follow: that of a GPU, and of a machine of which
    little is left; whether so."""
    if kind == "cpu" and _available() > SCARCE:
        return False
    _let_go(kind)
    return True


def _available() -> float:
    """Share of the machine's memory that processes could still have, as Linux tells it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1.0
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return kib["MemAvailable"] / kib["MemTotal"]


def peak_bytes(step: Callable[[], object], kind: Device) -> int:
    """The most memory that `step` takes beyond what is there before it: of this process on a CPU,
    of torch's allocator on a GPU."""
    _let_go(kind)
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    try:
        CLEAR_PEAK.write_text("5")  # the peak begins anew
    except OSError as error:
        raise RuntimeError("the peak memory of a process is read from Linux's /proc") from error
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes that Linux counts for this process under a name."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _let_go(kind: Device) -> None:
    """Give unused memory back, so that what a step takes shows."""
    gc.collect()
    if kind == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # musl has none
        trim(0)


def synchronize(kind: str) -> None:
    """Wait until a GPU has done all it was told."""
    if kind == "cuda":
        torch.cuda.synchronize()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _on_path(folder: Path | None):
    """What a process that is started meanwhile finds first: it is given this one's path."""
    if folder is None:
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


# ---- of what was measured ------------------------------------------------------------------------


class Spread(NamedTuple):
    """The median of some rounds (where it is said, their mean), and their range."""

    median: float
    least: float
    most: float

    def show(self, form: str = ".2f") -> str:
        """As in a table: median (least–most)."""
        median, least, most = (format(number, form) for number in self)
        return f"{median} ({least}–{most})"


def spread(values: Sequence[float]) -> Spread:
    """Median and range."""
    return Spread(statistics.median(values), min(values), max(values))


def mean_and_range(values: Sequence[float], form: str = ".2f") -> str:
    """As in a table: mean (least–most)."""
    return Spread(statistics.mean(values), min(values), max(values)).show(form)


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The quotients of each round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])
