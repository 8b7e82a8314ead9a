"""Weights & Biases beside the run, in a process of its own: it can neither stop nor stall the run.

A thread of the sink feeds JSON lines to a child process, and the child alone imports wandb. Inside
the training process wandb could block its exit (hooks that wait for the network), ask for a key on
the terminal or take over standard output; here a missing key, an unreachable server, a hang or a
crash costs one warning. This file is also the child's script: standard library alone at its top.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TextIO, final

_log = logging.getLogger(__name__)

KEEP_S = 600.0
"""How long wandb may take over a run's checkpoint: the run ends that much later at most."""

_QUEUE_LINES = 1000
_MAX_BINS = 512  # of a histogram, as wandb has it
_LAYER_NUMBERS = (
    "drop_rate",
    "token_drop_rate",
    "dropped_gate_mass",
    "padding_waste",
    "capacity_factor",
    "effective_capacity_factor",
    "max_vio",
    "load_cv",
    "load_entropy",
    "dead_experts",
)
_LAYER_LISTS = ("load", "drop_rate_by_choice")
_TIMES = ("step_time_s", "data_s", "probe_s")


@final
class WandbSink:
    """Sends metrics lines to wandb; whatever wandb does, `write` returns at once.

    Its files lie in RUN/wandb. The first failure is one warning, and nothing is sent after it.

    Args:
        run_dir: the run's folder.
        mode: `offline` needs neither key nor network; `wandb sync` uploads RUN/wandb later.
        project: wandb's project.
        name: the run's name there.
        config: the resolved configuration, without secrets.
        resumed: continue the wandb run that this folder began, if any.
        start_s: seconds that wandb may take to start.
        keep_s: seconds that it may take over a checkpoint that `keep` gives it.
        close_s: seconds that `close` lets it take to finish.
    """

    def __init__(
        self,
        run_dir: Path,
        mode: Literal["offline", "online"],
        project: str,
        name: str,
        config: Mapping[str, Any],
        resumed: bool,
        start_s: float = 60.0,
        keep_s: float = KEEP_S,
        close_s: float = 10.0,
    ) -> None:
        from moetrain.redact import redact  # the child cannot, and need not

        folder = run_dir.resolve() / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "mode": mode,
            "project": project,
            "name": name,
            "dir": str(run_dir.resolve()),
            "config": config,
            "id": _run_id(folder, resumed),
            "resume": "allow" if mode == "online" else None,
        }
        limits = {"start_s": start_s, "keep_s": keep_s, "finish_s": close_s}
        self._keep_s, self._close_s = keep_s, close_s
        self._best = math.inf
        self._redact = redact
        self._failed, self._failing = False, "wandb is off for the rest of this run"
        self._lock = threading.Lock()
        self._queue: queue.Queue[str | None] = queue.Queue(_QUEUE_LINES)
        self._queue.put(json.dumps({"init": settings, **limits}, default=str))
        self._child = _start_child(folder)
        self._thread = threading.Thread(target=self._feed, name="wandb", daemon=True)
        self._thread.start()
        log = folder / "process.log"
        self._logging = threading.Thread(
            target=self._keep_log, args=(log,), name="wandb-log", daemon=True
        )
        self._logging.start()

    def write(self, line: Mapping[str, Any]) -> None:
        """Queue one metrics line."""
        self._send("log", flatten(line))
        self.compare(line)

    def compare(self, line: Mapping[str, Any]) -> None:
        """Put the evaluation of a metrics line, if it holds the best so far, into the summary.

        wandb's own minimum would forget what a resumed run had reached before.
        """
        loss = line.get("eval_loss")
        if loss is not None and loss < self._best:
            self._best = loss
            self._send("summary", {f"best_{name}": value for name, value in line.items()})

    def keep(self, files: Mapping[str, Path], name: str, metadata: Mapping[str, Any]) -> bool:
        """Queue files and folders, by their names in it, as an artifact of type `model`.

        `close` waits for it, `keep_s` seconds more at most. Returns whether wandb still listens.
        """
        if self._failed:
            return False
        paths = {place: str(path.resolve()) for place, path in files.items()}
        self._failing = "wandb has not all of this run"
        self._close_s += self._keep_s
        self._send("keep", {"files": paths, "name": name, "metadata": metadata})
        return not self._failed

    def _send(self, kind: str, value: Mapping[str, Any]) -> None:
        if self._failed:
            return
        try:
            self._queue.put_nowait(json.dumps([kind, value]))
        except queue.Full:
            self._fail(f"it is {_QUEUE_LINES} lines behind")

    def close(self) -> None:
        """Let wandb finish; returns after about `close_s` seconds at the latest."""
        deadline = time.monotonic() + self._close_s + 1
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=self._close_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._fail(f"it did not finish within {self._close_s:g} s")
            self._thread.join(1)
        self._logging.join(1)  # not longer: wandb may leave a process that keeps the pipe open

    def _feed(self) -> None:
        """The thread: pass the lines on, then hear how the child ended."""
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(OSError), stdin:  # OSError: the child is gone
            while (line := self._queue.get()) is not None:
                stdin.write(line + "\n")
                stdin.flush()
        with stdout:
            reason = stdout.read().strip()
        if self._child.wait() != 0:
            self._fail(reason or f"its process ended with code {self._child.returncode}")

    def _keep_log(self, path: Path) -> None:
        """The other thread: write down what the child prints, without secrets."""
        stderr = self._child.stderr
        assert stderr is not None
        with path.open("a") as log, stderr:
            for line in stderr:
                log.write(self._redact(line))
                log.flush()

    def _fail(self, reason: str) -> None:
        with self._lock:
            if self._failed:
                return
            self._failed = True
        _log.warning("%s: %s", self._failing, self._redact(reason))
        with contextlib.suppress(ProcessLookupError):
            if self._child.poll() is None:
                os.killpg(self._child.pid, signal.SIGKILL)
        # The thread may yet pass lines to the dying child: what waits must end for it to end.
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._queue.put_nowait(None)


def flatten(line: Mapping[str, Any]) -> dict[str, Any]:
    """A metrics line as wandb shows it: numbers by name, and what each MoE layer has by layer.

    `drop_rate/layer_00` puts all layers of a figure into one section. Lists, `load/layer_00` (by
    expert) and `drop_rate_by_choice/layer_00`, become histograms; counts stay in metrics.jsonl.
    Of times by rank the spread is shown, `spread/data_s`: the longest over the median.
    """
    shown = {name: value for name, value in line.items() if isinstance(value, int | float)}
    for name in _TIMES:
        times = line.get(f"{name}_by_rank")
        if times and (usual := statistics.median_low(times)) > 0:
            shown[f"spread/{name}"] = max(times) / usual
    for index, layer in enumerate(line.get("layers", ())):
        lists = [name for name in _LAYER_LISTS if len(layer[name]) <= _MAX_BINS]
        for name in (*_LAYER_NUMBERS, *lists):
            if layer[name] is not None:
                shown[f"{name}/layer_{index:02d}"] = layer[name]
    return shown


def _run_id(folder: Path, resumed: bool) -> str:
    """The id by which wandb knows this run, kept in the folder across restarts."""
    file = folder / "run-id"
    if not (resumed and file.exists()):
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text().strip()


def _start_child(folder: Path) -> subprocess.Popen[str]:
    """Run this file: lines go in by stdin, the reason of a failure comes back by stdout, and what
    it prints by stderr."""
    # A session of its own keeps the terminal's Ctrl-C and torchrun's signals from the child: it
    # ends with its input. -P keeps this package's modules from shadowing anyone's.
    return subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        env={
            "WANDB_CACHE_DIR": str(folder / "cache"),
            "WANDB_DATA_DIR": str(folder / "data"),  # artifacts that are not uploaded yet
            "WANDB_SILENT": "true",
        }
        | os.environ,
    )


def _child_main(lines: TextIO, report: TextIO) -> None:
    """The child: start wandb, pass every line on, finish; `report` hears why where that fails."""
    first = json.loads(lines.readline())
    init, not_kept = first["init"], ""
    try:
        with _limit(first["start_s"], "start", report):
            run = _init_wandb(init, first["start_s"])
        for text in lines:
            kind, value = json.loads(text)
            if kind == "log":
                run.log({name: _shown(figure) for name, figure in value.items()})
            elif kind == "summary":
                run.summary.update(value)
            else:
                with _limit(first["keep_s"], "keep the checkpoint", report):
                    not_kept = _keep(run, init["mode"], **value)
        with _limit(first["finish_s"], "finish", report):
            run.finish()
    except BaseException as error:
        _end(f"{type(error).__name__}: {error}", report)
    if not_kept:
        _end(not_kept, report)


def _init_wandb(init: dict[str, Any], timeout_s: float) -> Any:
    import wandb

    settings = {
        "console": "off",
        "silent": True,
        "disable_git": True,
        "save_code": False,
        "x_disable_meta": True,  # it would record the command line, which may hold secrets
        "x_stats_pid": os.getppid(),  # whose memory and GPUs to chart
        "init_timeout": timeout_s,
    }
    run = wandb.init(**init, settings=settings)
    # A step of our own: a resumed run goes back in steps, which wandb's counter does not allow.
    run.define_metric("*", step_metric="step")
    return run


def _keep(run: Any, mode: str, files: dict[str, str], name: str, metadata: dict[str, Any]) -> str:
    """Give files to wandb as a model and, online, wait until it has them.

    Returns why that failed: then what was logged must still be finished.
    """
    import wandb

    # Offline, wandb copies the files, which may be gone when they are uploaded.
    policy = "mutable" if mode == "offline" else "immutable"
    try:
        artifact = wandb.Artifact(name, type="model", metadata=metadata)
        for place, path in files.items():
            add = artifact.add_dir if os.path.isdir(path) else artifact.add_file
            add(path, name=place, policy=policy, skip_cache=True)
        run.log_artifact(artifact)
        if mode == "online":
            artifact.wait()
    except Exception as error:
        return f"the checkpoint is not kept: {type(error).__name__}: {error}"
    return ""


def _shown(value: Any) -> Any:
    """A list as a histogram with a bar for each entry: over steps, wandb draws a heat map of it."""
    if not isinstance(value, list):
        return value
    import wandb

    bars: Any = (value, list(range(len(value) + 1)))
    return wandb.Histogram(np_histogram=bars)


@contextlib.contextmanager
def _limit(seconds: float, what: str, report: TextIO) -> Iterator[None]:
    """End this process where the block takes longer than `seconds`."""
    timer = threading.Timer(seconds, _end, [f"it did not {what} within {seconds:g} s", report])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(reason: str, report: TextIO) -> None:
    """Report and leave at once, past every exit hook that might wait."""
    report.write(reason)
    report.flush()
    os._exit(1)


if __name__ == "__main__":
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what wandb prints goes to the log
    _child_main(sys.stdin, report)
