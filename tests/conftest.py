from __future__ import annotations

from collections.abc import Iterator

import pytest

from moetrain.testing import RankPool


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    """Two Gloo processes, shared by the session; a call that fails replaces them."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    """Four Gloo processes, shared by the session; a call that fails replaces them."""
    with RankPool(4) as pool:
        yield pool
