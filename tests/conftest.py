from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

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


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint of two ranks, for tests that copy it or only read it."""
    # Not at the top: few tests need checkpoints, which take a while to import.
    from checkpoints import save

    run = tmp_path_factory.mktemp("run")
    save(run, 100, seed=1, edp=1, ep=2)
    return run


@pytest.fixture
def saved_run(saved_once: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(saved_once, tmp_path / "run"))


@pytest.fixture
def saved(saved_run: Path) -> Path:
    """The checkpoint in that copy."""
    return saved_run / "checkpoints" / "step-00000100"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes take turns with others, as long as there are any: they take the
    longest and mostly wait, so that there is something to compute meanwhile, and a worker that is
    left alone with one at the end would keep the others idle."""
    files = list(dict.fromkeys(item.path for item in items))
    waiting = [file for file in files if file.parent.name == "ranks"]
    computing = [file for file in files if file not in waiting]
    turns = itertools.chain.from_iterable(itertools.zip_longest(waiting, computing))
    place = {file: number for number, file in enumerate(filter(None, turns))}
    items.sort(key=lambda item: place[item.path])


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--full-matrix`: every combination where the suite runs a cover of all pairs."""
    parser.addoption("--full-matrix", action="store_true", help="see tests/ranks/test_matrix.py")
