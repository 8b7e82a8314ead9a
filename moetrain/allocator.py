"""How the C library deals with memory that tensors leave behind, on CPUs."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Options of glibc's mallopt(3): from how many free bytes on memory is given back (-1: never), and
how many blocks may be taken from the kernel one by one."""


def keep_memory() -> None:
    """Let this process use the memory of freed tensors again, instead of giving it back.

    glibc takes every large block from the kernel anew and returns it at once. The kernel then
    clears each page when it is first touched, which takes longer than what most operations on
    activations do with it. The price is that the process stays as large as it has once been.
    Nothing happens where the C library has no such options.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
