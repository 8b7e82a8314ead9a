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
class Summary:
    def __init__(self, run): self.run = run
    def update(self, values): self.run.record("summary", values)
class Run:
    def define_metric(self, *args, **kwargs): self.record("define", [args, kwargs])
    def log(self, values): act("LOG"); self.record("log", values)
    def log_artifact(self, artifact): act("KEEP"); self.record("artifact", artifact)
    @property
    def summary(self): return Summary(self)
    def finish(self): act("FINISH"); self.record("finish", None)
    def record(self, kind, value):
        with open(os.environ["FAKE_RECORD"], "a") as file:
            file.write(json.dumps([kind, value], default=vars) + "\\n")
class Artifact:
    def __init__(self, name, type, metadata):
        self.name, self.type, self.metadata, self.files = name, type, metadata, {}
    def add_file(self, path, name, policy, skip_cache):
        self.files[name] = [policy, os.path.getsize(path)]
    def add_dir(self, path, name, policy, skip_cache):
        for file in sorted(os.listdir(path)):
            self.add_file(os.path.join(path, file), name + "/" + file, policy, skip_cache)
    def wait(self): act("WAIT")
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

    FAKE_INIT, FAKE_LOG, FAKE_KEEP (an artifact is begun), FAKE_WAIT (for it) and FAKE_FINISH say
    what goes wrong when: raise, exit, die, block (for ever), slow, wait (until the file FAKE_UNTIL
    is there), tell (print the key and raise with it).
    """
    (folder / "site").mkdir()
    (folder / "site" / "wandb.py").write_text(FAKE)
    record = folder / "record"
    patch.setenv("PYTHONPATH", str(folder / "site"))
    patch.setenv("FAKE_RECORD", str(record))
    return lambda: [json.loads(line) for line in record.read_text().splitlines()]
