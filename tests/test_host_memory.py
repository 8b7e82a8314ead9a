"""Memory that is freed stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

ALLOCATING = """
import resource, sys
import torch
from moetrain.host_memory import keep_freed

if sys.argv[1] == "kept":
    keep_freed()
pages = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large = [torch.ones(2**24) for _ in range(2)]  # 64 MiB each
    del large
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(pages[-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how glibc allocates")
def test_pages_are_asked_for_once() -> None:
    def pages(word: str) -> int:
        command = [sys.executable, "-c", ALLOCATING, word]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert pages("given back") > 1000
    assert pages("kept") < 10
