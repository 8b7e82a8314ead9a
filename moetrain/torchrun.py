"""torchrun as moetrain starts it: private where it can be, with exit codes and errors that tell.

`python -m moetrain.torchrun --nproc-per-node=2 -m moetrain train CONFIG` takes torchrun's options
and is torchrun's elastic agent, with these differences:

- A single node, and its ranks, listen on loopback alone: torchrun's own store listens on every
  interface, `--standalone` included. The port is any free one.
- SIGTERM, SIGINT and SIGUSR1 are passed on to the ranks, which have the time they need to save;
  torchrun would kill them after 30 seconds, and exit with 1. Ranks do not outlive their agent.
- The exit code is the ranks' own where that says something: 2 for a mistake, 75 after a stop.
- `--max-restarts` restarts what may go well the next time: ranks that were killed, hung or raised.
  Not those that stopped, met a mistake of the user's, or cannot go on as they are.
- The first error of all ranks is printed last, and what followed from it not at all.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any, final

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher import api as launcher
from torch.distributed.run import parse_args, run

from moetrain.failure import BAD_INPUT, FAILED, LAUNCHER, RESTARTS
from moetrain.saying import forget, say
from moetrain.stopping import REQUEST, SIGNALS, STOPPED

HOST = "127.0.0.1"
ASKED = {STOPPED, *(128 + number for number in SIGNALS)}
"""Exit codes of ranks that a signal stopped."""
SAVING_S = 600
"""How long ranks that are well may take to save before they are started again on other nodes."""
ORDER = ("mistake", "final", "hang", "failure", "killed", "unbegun", "consequence", "ended")
"""Which kind of failure explains the others, first to last. A rank that was killed is outranked by
one that says why it ended: the agent kills those that do not end by themselves. It outranks those
that had not begun: they end so when the agent asks them to, because of it."""


@final
class Loopback(RendezvousHandler):
    """The rendezvous of one agent with itself: a store behind a socket bound to loopback."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id

    def get_backend(self) -> str:
        """The name for `--rdzv-backend`."""
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        """The ranks join this store instead of opening one of their own."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """A new store, in which ranks that are started again find nothing of those before, and
        this agent as the only one."""
        listener = socket.create_server((HOST, 0))
        port: int = listener.getsockname()[1]
        # The store takes the socket over and closes it.
        store = TCPStore(
            HOST,
            port,
            is_master=True,
            timeout=timedelta(minutes=10),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        named = PrefixStore(self._run_id, store)
        return RendezvousInfo(named, 0, 1, RendezvousStoreInfo(HOST, port))

    def is_closed(self) -> bool:
        """No other agent can close it."""
        return False

    def set_closed(self) -> None:
        """No other agent needs to know."""

    def num_nodes_waiting(self) -> int:
        """No other agent can join."""
        return 0

    def get_run_id(self) -> str:
        """The run's id, as torchrun gave it."""
        return self._run_id

    def shutdown(self) -> bool:
        """The store ends with the agent."""
        return True


class Agent(LocalElasticAgent):
    """torchrun's agent; passes signals on, and knows which failures another try may mend."""

    def __init__(self, spec: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(spec, *args, **kwargs)
        handler = spec.rdzv_handler
        handler.num_nodes_waiting = partial(_none_if_lost, handler.num_nodes_waiting)
        self._starts = 0
        self._to_pass_on: list[int] = []
        self._passed_on: set[int] = set()
        for number in SIGNALS:
            signal.signal(number, self._take)

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        # torchrun's own count leaves out restarts because nodes have come or gone.
        os.environ[RESTARTS] = str(self._starts)
        self._starts += 1
        return super()._start_workers(worker_group)  # type: ignore[call-arg]

    def _stop_workers(self, worker_group: Any) -> None:
        if self._pcontext is not None:  # where nodes have come or gone, ranks are well and save
            self._pcontext.close(REQUEST, SAVING_S)
        if self._to_pass_on:
            raise SignalException("while ranks stop", signal.Signals(self._to_pass_on[0]))
        super()._stop_workers(worker_group)  # type: ignore[call-arg]

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._worker_group.state != WorkerState.HEALTHY:  # it waits for other agents, say
            raise SignalException("while no ranks run", signal.Signals(number))
        self._to_pass_on.append(number)

    def _pass_on(self) -> None:
        while self._to_pass_on:
            number = self._to_pass_on.pop(0)
            if not self._passed_on:
                number = REQUEST  # they may have had this one already
            self._passed_on.add(number)
            for pid in self._pcontext.pids().values():  # type: ignore[union-attr]
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        self._pass_on()
        result: RunResult = super()._monitor_workers(worker_group)  # type: ignore[call-arg]
        failures = result.failures.values()
        if not failures:
            return result
        if self._makes_room(result):
            return RunResult(WorkerState.HEALTHY)  # and so it starts them again
        if all(-failure.exitcode in self._passed_on for failure in failures):
            for failure in failures:  # they were still starting: there was nothing to save
                failure.exitcode = STOPPED
        if self._passed_on or _is_final(result.failures):
            self._remaining_restarts = 0
        if self._remaining_restarts:
            say(f"{describe(result.failures)}\nmoetrain: starting all ranks again")
        return result

    def _makes_room(self, result: RunResult) -> bool:
        """Whether its ranks have stopped because another agent's were asked to, for a new node."""
        codes = {failure.exitcode for failure in result.failures.values()}
        handler = self._worker_group.spec.rdzv_handler
        return codes <= ASKED and not self._passed_on and handler.num_nodes_waiting() > 0


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments; return the exit code."""
    options = parse_args(list(arguments))
    if not options.rdzv_endpoint and options.nnodes in ("1", "1:1"):
        rendezvous_handler_registry.register("loopback", Loopback)
        options.rdzv_backend, options.rdzv_endpoint = "loopback", HOST
        options.standalone = False
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ[name] = "lo0" if sys.platform == "darwin" else "lo"
    # Else ranks meet at a store of the agent that was first, and one that comes later never hears
    # where that is (torch 2.11 to 2.13).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    options.signals_to_handle = "SIGHUP,SIGQUIT"  # others are the agent's own
    launcher.LocalElasticAgent = Agent  # type: ignore[misc]
    os.environ[LAUNCHER] = str(os.getpid())
    # What it logs of ranks that end is said better below.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run(options)
    except ChildFailedError as error:
        code = exit_code(error.failures)
        if code not in ASKED:
            say(describe(error.failures))
        return code
    except SignalException as error:
        say(f"moetrain: ended by {error.sigval.name}")
        return STOPPED if error.sigval in SIGNALS else 128 + error.sigval
    except RendezvousError as error:
        where = options.rdzv_endpoint or f"{options.master_addr}:{options.master_port}"
        reason = str(error.__cause__ or error).partition("\n")[0] or "not all came in time"
        say(f"moetrain: error: the agents of this run cannot meet at {where}: {reason}")
        return FAILED
    return 0


def exit_code(failures: Mapping[int, ProcessFailure]) -> int:
    """The exit code of a run: that of the failure that explains the others."""
    code = failures[first(failures)].exitcode
    return code if code in {BAD_INPUT, *ASKED} else FAILED


def describe(failures: Mapping[int, ProcessFailure]) -> str:
    """The failure that explains the others, in the words of its rank."""
    rank = first(failures)
    failure = failures[rank]
    kind, text = _kind(failure), _text(failure)
    if kind in ("mistake", "final", "hang"):  # as every rank would say it
        return f"moetrain: error: {text}"
    if text:
        return (
            f"moetrain: error: the first error, of rank {rank} on {socket.gethostname()}:\n{text}"
        )
    how = f"exit code {failure.exitcode}"
    if failure.exitcode < 0:
        how = f"killed by {failure.signal_name()}"
    return f"moetrain: error: rank {rank} on {socket.gethostname()}: {how}"


def first(failures: Mapping[int, ProcessFailure]) -> int:
    """The rank whose failure explains the others."""
    return min(
        failures, key=lambda rank: (ORDER.index(_kind(failures[rank])), _time(failures[rank]))
    )


def _none_if_lost(count: Callable[[], int]) -> int:
    """How many nodes wait to join: none can once the agent that keeps the store has ended, while
    the ranks here may still end well."""
    try:
        return count()
    except RendezvousConnectionError:
        return 0


def _kind(failure: ProcessFailure) -> str:
    if (note := failure.error_file_data.get("moetrain")) is not None:
        return note["kind"]
    if failure.exitcode in ASKED:
        return "final"
    return "killed" if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM else "ended"


def _is_final(failures: Mapping[int, ProcessFailure]) -> bool:
    """Whether another try would go no better, or is not wanted."""
    return _kind(failures[first(failures)]) in ("mistake", "final", "unbegun")


def _time(failure: ProcessFailure) -> float:
    note = failure.error_file_data.get("moetrain", {})
    return note.get("time", failure.timestamp)


def _text(failure: ProcessFailure) -> str:
    message = failure.error_file_data["message"]
    return message["message"].rstrip() if isinstance(message, dict) else ""


if __name__ == "__main__":
    code = main(sys.argv[1:])
    for number in SIGNALS:  # the outcome stands, whatever comes while the process ends
        signal.signal(number, signal.SIG_IGN)
    forget(sys.stderr)
    sys.exit(code)
