"""What both kinds of ranks say when something is wrong."""

from __future__ import annotations

DEFAULT_TIMEOUT = 60.0
"""Seconds a call may take."""
STOP_SECONDS = 5.0
"""How long ranks have to end when the call is over."""


def require_ranks(num_ranks: int) -> None:
    """Refuse a world without ranks."""
    if num_ranks < 1:
        raise ValueError(f"num_ranks ({num_ranks}) must be at least 1")


def stuck_message(stuck: dict[int, str], num_ranks: int, timeout: float) -> str:
    """Name the stuck ranks; those that stand at the same place share a stack."""
    by_stack: dict[str, list[int]] = {}
    for rank in sorted(stuck):
        by_stack.setdefault(stuck[rank], []).append(rank)
    places = "\n".join(f"ranks {ranks}:\n{stack}" for stack, ranks in by_stack.items())
    return (
        f"ranks {sorted(stuck)} of {num_ranks} still run after {timeout} s; "
        f"most often a collective that not every rank joins\n{places}"
    )
