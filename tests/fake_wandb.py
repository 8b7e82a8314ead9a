"""A wandb that notes what it is told, and fails or waits where it is asked to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

FAKE = """
import json, os, signal, sys, time
def act(when):
    action = os.environ.get("FAKE_" + when)
    if action == "raise": raise RuntimeError("no network at " + when)
    if action == "exit": sys.exit("leaving")
    if action == "die": os.kill(os.getpid(), signal.SIGKILL)
    if action == "block": time.sleep(1000)
    if action == "slow": time.sleep(1)
    if action == "wait":
        while not os.path.exists(os.environ["FAKE_UNTIL"]): time.sleep(0.02)
    if action == "tell":
        print("the key is", os.environ["WANDB_API_KEY"], file=sys.stderr)
        raise RuntimeError("refused " + os.environ["WANDB_API_KEY"])
class Run:
    def define_metric(self, *args, **kwargs): self.record("define", [args, kwargs])
    def log(self, values): act("LOG"); self.record("log", values)
    def finish(self): act("FINISH"); self.record("finish", None)
    def record(self, kind, value):
        with open(os.environ["FAKE_RECORD"], "a") as file:
            file.write(json.dumps([kind, value], default=vars) + "\\n")
class Histogram:
    def __init__(self, np_histogram): self.values, self.bins = np_histogram
def init(**kwargs):
    print("chatter of wandb")
    act("INIT")
    run = Run()
    run.record("init", kwargs)
    return run
"""


def install(folder: Path, patch: pytest.MonkeyPatch) -> Callable[[], list[list]]:
    """Let processes that are started from here find it; returns how to read what it was told.

    FAKE_INIT, FAKE_LOG and FAKE_FINISH say what goes wrong when: raise, exit, die, block (for
    ever), slow, wait (until the file FAKE_UNTIL is there), tell (print the key and raise with it).
    """
    (folder / "site").mkdir()
    (folder / "site" / "wandb.py").write_text(FAKE)
    record = folder / "record"
    patch.setenv("PYTHONPATH", str(folder / "site"))
    patch.setenv("FAKE_RECORD", str(record))
    return lambda: [json.loads(line) for line in record.read_text().splitlines()]
