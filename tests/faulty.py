"""`moetrain`, but one rank goes wrong at a step: what no signal from outside can do.

    FAULT="raise 1 5" python tests/faulty.py train CONFIG

`raise`, `kill` (itself, by SIGKILL), `loop` (for ever) or `read` (its batches, slowly), the rank,
and the step; 0 is before the model is built. Ranks that are started again do not.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from moetrain import cli, train


def go_wrong(fault: str) -> None:
    """Make this process's rank do so, if it is the one meant."""
    kind, rank, at = fault.split()
    if os.environ["RANK"] != rank or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    if at == "0":
        train.set_up = lambda *_: _go_wrong(kind)
        return
    train_step = train.train_step

    def wrapped(run: Any, position: Any, *others: Any) -> Any:
        if position.step + 1 == int(at):
            if kind == "read":
                run.samples.batch = _slowly(run.samples.batch)
            else:
                _go_wrong(kind)
        return train_step(run, position, *others)

    train.train_step = wrapped


def _slowly(batch: Callable[..., Any]) -> Callable[..., Any]:
    def read(*arguments: Any) -> Any:
        print("reading", flush=True)
        time.sleep(1)
        return batch(*arguments)

    return read


def _go_wrong(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "loop":
        while True:
            time.sleep(0.01)
    raise RuntimeError("the cause of it all")


if __name__ == "__main__":
    for one in os.environ["FAULT"].split(","):
        go_wrong(one)
    sys.exit(cli.main())
