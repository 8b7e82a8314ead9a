"""Layouts × engines × recomputation × transport, in Gloo processes, all against one process.

The suite runs a cover in which every pair of two axes' values occurs; every combination there is
runs with `--full-matrix`.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import parity
import pytest
from layouts import Case, Layout, pick, spread

from moetrain.config import Config
from moetrain.testing import RankPool

LAYOUTS = {
    "ep2": Layout(2, ep=2, dp_replicate=1, micro=4),
    "ep4": Layout(4, ep=4, dp_replicate=1, micro=4),
    "data2-ep2": Layout(4, ep=2, dp_replicate=1, micro=2),
    "hsdp": Layout(4, ep=2, dp_replicate=2, micro=4),
}
ENGINES = {
    "torch": {"kind": "torch", "precision": "fp64"},
    **{
        f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage, "precision": "fp32"}
        for stage in range(3)
    },
}
RECOMPUTE = ("none", "selective", "full")
# Tokens choose without drops by gate, in which equal ones tie: fp32 does not round as fp64 does.
CASE = {dropless: pick("topk", dropless=dropless) for dropless in (False, True)}
TRANSPORT = {
    "capacity": {},
    "dropless": {},
    "chunked": {"overlap_chunks": 2},
    "chunked-dropless": {"overlap_chunks": 4},
    "two-level": {"dispatch": "two_level", "nodes": 2},
    "two-level-dropless": {"dispatch": "two_level", "nodes": 2, "overlap_chunks": 2},
    "all-gather": {"dispatch": "all_gather"},
    "all-gather-dropless": {"dispatch": "all_gather"},
}
AXES = (tuple(LAYOUTS), tuple(ENGINES), RECOMPUTE, tuple(TRANSPORT))
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}


class Way(NamedTuple):
    """One way to train the same thing."""

    layout: str
    engine: str
    recompute: str
    transport: str

    def __str__(self) -> str:
        return "-".join(self)

    @property
    def exists(self) -> bool:
        """ZeRO has no copies of a sharded model."""
        return self.layout != "hsdp" or self.engine == "torch"

    @property
    def case(self) -> Case:
        """What is trained."""
        return CASE[self.transport.endswith("dropless")]

    @property
    def config(self) -> Config:
        """All settings."""
        sections = self.case.config.model_dump()
        sections["engine"] = {
            **ENGINES[self.engine], "activation_checkpointing": self.recompute,
        }  # fmt: skip
        config = spread(Config.model_validate(sections), LAYOUTS[self.layout])
        sections = config.model_dump()
        sections["parallel"].update(TRANSPORT[self.transport])
        return Config.model_validate(sections)


EVERY_WAY = [way for way in itertools.starmap(Way, itertools.product(*AXES)) if way.exists]


def pairs_of(way: Way) -> set[tuple[int, str, int, str]]:
    """The pairs of values of two axes that it holds."""
    axes = itertools.combinations(enumerate(way), 2)
    return {(i, one, j, other) for (i, one), (j, other) in axes}


def cover() -> list[Way]:
    """Ways that hold every pair, greedily few."""
    missing, found = set().union(*map(pairs_of, EVERY_WAY)), []
    while missing:
        best = max(EVERY_WAY, key=lambda way: len(pairs_of(way) & missing))
        found.append(best)
        missing -= pairs_of(best)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cover, or everything."""
    if "way" in metafunc.fixturenames:
        ways = EVERY_WAY if metafunc.config.getoption("--full-matrix") else cover()
        metafunc.parametrize("way", sorted(ways), ids=str)


def test_the_cover_holds_every_pair() -> None:
    ways = cover()
    assert set().union(*map(pairs_of, ways)) == set().union(*map(pairs_of, EVERY_WAY))
    assert len(ways) < len(EVERY_WAY) / 5


@functools.cache
def reference(case: Case) -> parity.Outcome:
    return parity.alone(case.config, case.text)


@pytest.fixture(scope="module")
def pool_of(ranks2: RankPool, ranks4: RankPool) -> Callable[[int], RankPool]:
    """A pool of so many ranks, now and then a new one: every process group leaves threads behind,
    and hundreds of them slow down what comes after."""
    pools, calls = {2: ranks2, 4: ranks4}, Counter[int]()

    def pool(world: int) -> RankPool:
        calls[world] += 1
        if calls[world] % 20 == 0:
            pools[world].renew()
        return pools[world]

    return pool


def test_every_way_trains_the_same(pool_of: Callable[[int], RankPool], way: Way) -> None:
    """Where tokens went, losses, every gradient, the norm before clipping, and the weights after
    two steps."""
    config: Any = way.config
    ranks = pool_of(LAYOUTS[way.layout].world).run(parity.on_rank, config, way.case.text)
    parity.agree(ranks, reference(way.case), TOLERANCE[config.engine.precision])
