"""Memory that a CPU computes in, which the C library is to keep rather than give back."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""glibc's names for what mallopt(3) sets."""
_MOST = 2**31 - 1


def keep_freed() -> None:
    """From now on this process keeps what it frees, for what it allocates next.

    glibc returns large blocks to the kernel, which then zeroes every page of the next one: at each
    step of training anew, all of its activations. The price is that the process stays as large as
    it has once been, and larger where blocks of other sizes do not fit into those that became free.
    Nothing happens with other C libraries.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _MOST)
