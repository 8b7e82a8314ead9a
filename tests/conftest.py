from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import forkserver

import pytest

from moetrain.testing import RankPool
from moetrain.testing.processes import PRELOADED


@pytest.fixture(scope="session")
def _server() -> None:
    """Start the server that ranks are forks of with all that DeepSpeed imports as it starts, the
    compiler among it: each rank would take seconds for that."""
    forkserver.set_forkserver_preload([*PRELOADED, "deepspeed.runtime.zero.muon.original_muon"])
    forkserver.ensure_running()


# Not for the session: idle Gloo processes keep their threads, which take a share of the cores.
@pytest.fixture(scope="module")
def ranks2(_server: None) -> Iterator[RankPool]:
    """Two Gloo processes, shared by a module; a call that fails replaces them."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def ranks4(_server: None) -> Iterator[RankPool]:
    """Four Gloo processes, shared by a module; a call that fails replaces them."""
    with RankPool(4) as pool:
        yield pool


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--full-matrix`: every combination where the suite runs a cover of all pairs."""
    parser.addoption("--full-matrix", action="store_true", help="see tests/ranks/test_matrix.py")
