"""Starting the ranks of a run: as forks of a server that has imported all, or by the launcher."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch.distributed import TCPStore

from moetrain.stopping import STOPPED
from moetrain.testing.processes import PRELOADED

from . import worker
from .checks import SoakError

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
PEERS_S = 10.0
"""How long ranks have to end once one of them has stopped as asked, or their launcher is gone."""
GRACE_S = 30.0
"""How long they have to end once they are told to, as under torchrun."""
DEEPSPEED = "deepspeed.runtime.zero.muon.original_muon"
"""Imports all that DeepSpeed's start does."""


class Start(Protocol):
    """Ranks that were started together."""

    agent: int | None
    """The process that started them and watches them, if it is one that can be killed."""

    def ranks(self) -> list[int]:
        """Those that live, by process id."""
        ...

    def poll(self) -> int | None:
        """The exit code of all of them together; None while one lives."""
        ...

    def close(self) -> None:
        """Kill what is left."""
        ...


def environment(**variables: str) -> dict[str, str]:
    """This process's, with what ranks on one machine need."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, **ours, **variables}


def preload() -> None:
    """Have the server that ranks are forks of import everything once; before its first fork."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED, DEEPSPEED])


@final
class Forked:
    """Ranks that need no imports; this process does for them what their launcher would."""

    agent: int | None = None

    def __init__(self, ranks: int, args: Sequence[str], journals: Path, log: Path) -> None:
        listener = socket.create_server((HOST, 0))
        port = listener.getsockname()[1]
        # The store takes the socket over and closes it.
        self._store = TCPStore(
            HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._ended_at: float | None = None
        """When the first rank ended otherwise than well ..."""
        self._told_at: float | None = None
        """... and when the others were told to."""
        context = multiprocessing.get_context("forkserver")
        self._ranks: list[Any] = []
        for rank in range(ranks):
            environ = environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(ranks),
                LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR=HOST,
                MASTER_PORT=str(port),
                TORCHELASTIC_USE_AGENT_STORE="True",
            )
            process = context.Process(
                target=_rank, args=(environ, args, journals, log), daemon=True
            )
            process.start()
            self._ranks.append(process)

    def ranks(self) -> list[int]:
        """See `Start`."""
        return [rank.pid for rank in self._ranks if rank.is_alive()]

    def poll(self) -> int | None:
        """See `Start`. When a rank has failed, the others are told to end, and after a while
        killed; so they are where one stopped and they do not."""
        codes = [rank.exitcode for rank in self._ranks]
        failed = [code for code in codes if code not in (None, 0, STOPPED)]
        if None not in codes:
            return failed[0] if failed else max(codes)
        if any(codes):
            self._end_peers(at_once=bool(failed))
        return None

    def _end_peers(self, at_once: bool) -> None:
        now = time.monotonic()
        self._ended_at = self._ended_at or now
        if self._told_at is None and (at_once or now > self._ended_at + PEERS_S):
            self._told_at = now
            for rank in self._ranks:
                rank.terminate()
        if self._told_at is not None and now > self._told_at + GRACE_S:
            for rank in self._ranks:
                rank.kill()

    def close(self) -> None:
        """See `Start`."""
        for rank in self._ranks:
            rank.kill()
            rank.join()
            rank.close()


def _rank(environ: dict[str, str], args: Sequence[str], journals: Path, log: Path) -> None:
    """Life of a forked rank; what it says goes to `log`."""
    os.environ.clear()
    os.environ.update(environ)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    sys.exit(worker.main(journals, args))


@final
class Launched:
    """Ranks under `python -m moetrain.torchrun`, as a user starts them."""

    def __init__(self, ranks: int, args: Sequence[str], journals: Path, log: Path) -> None:
        command = [sys.executable, "-m", "moetrain.torchrun", f"--nproc-per-node={ranks}"]
        with log.open("a") as output:
            self._agent = subprocess.Popen(
                [*command, worker.__file__, str(journals), *args],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.agent: int | None = self._agent.pid
        self._known: list[int] = []

    def ranks(self) -> list[int]:
        """See `Start`."""
        self._known = children(self._agent.pid)
        return self._known

    def poll(self) -> int | None:
        """See `Start`. Raises SoakError where ranks outlive their launcher."""
        if self._agent.poll() is not None:
            self._see_ranks_end()
        return self._agent.returncode

    def close(self) -> None:
        """See `Start`."""
        if self._agent.poll() is None:
            self._known = children(self._agent.pid)
            self._agent.kill()
            self._agent.wait()
        self._see_ranks_end()

    def _see_ranks_end(self) -> None:
        deadline = time.monotonic() + PEERS_S
        for pid in self._known:
            while _state(pid) not in ("", "Z", "X"):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    raise SoakError(f"process {pid} outlived its launcher")
                time.sleep(0.01)
        self._known = []


def children(parent: int) -> list[int]:
    """Processes that another one started, as Linux tells."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if _stat(pid)[1:2] == [str(parent)]]


def _state(pid: int) -> str:
    """One letter; nothing where there is no such process."""
    return "".join(_stat(pid)[:1])


def _stat(pid: int) -> list[str]:
    """State, parent and more of a process; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
