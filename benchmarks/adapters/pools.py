"""Rank processes that stay between calls, one pool for every number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

from moetrain.testing import RankPool


class Pools:
    """A launcher for the conformance suite; a context manager."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __call__(
        self, num_ranks: int, fn: Callable[..., Any], *args: Any, timeout: float
    ) -> list[Any]:
        """As `moetrain.testing.run_ranks`."""
        if num_ranks not in self._pools:
            self._pools[num_ranks] = self._open.enter_context(RankPool(num_ranks))
        return self._pools[num_ranks].run(fn, *args, timeout=timeout)
