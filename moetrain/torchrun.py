"""torchrun for a single node, listening on loopback alone.

`python -m moetrain.torchrun --nproc-per-node=2 -m moetrain train CONFIG` takes torchrun's options
and works as it does, but the store through which agent and ranks find each other cannot be reached
from outside: torchrun's own listens on every interface, `--standalone` included. The port is any
free one.
"""

from __future__ import annotations

import socket
import sys
from datetime import timedelta
from typing import final

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.run import main

HOST = "127.0.0.1"


@final
class Loopback(RendezvousHandler):
    """The rendezvous of one agent with itself: a store behind a socket bound to loopback."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        if parameters.max_nodes != 1:
            raise ValueError(f"--nnodes ({parameters.max_nodes}) must be 1; use torchrun for more")
        self._run_id = parameters.run_id
        listener = socket.create_server((HOST, 0))
        self._port: int = listener.getsockname()[1]
        # The store takes the socket over and closes it.
        self._store = TCPStore(
            HOST,
            self._port,
            is_master=True,
            timeout=timedelta(minutes=10),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def get_backend(self) -> str:
        """The name for `--rdzv-backend`."""
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        """The ranks join this store instead of opening one of their own."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """The store, and this agent as the only one."""
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(HOST, self._port))

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


if __name__ == "__main__":
    rendezvous_handler_registry.register("loopback", Loopback)
    main(["--rdzv-backend=loopback", f"--rdzv-endpoint={HOST}", *sys.argv[1:]])
