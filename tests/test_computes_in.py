"""What a machine multiplies, and what `engine.precision: auto` makes of that."""

from __future__ import annotations

import platform

import pytest
import torch
import torch.distributed as dist
from runs import train_on, write_config

from moetrain.config import EngineConfig
from moetrain.errors import UserError
from moetrain.precision import computes_in, multiplies_bf16
from moetrain.trace import Trace

ON_X86 = pytest.mark.skipif(
    torch.cuda.is_available() or platform.machine() != "x86_64", reason="of x86 CPUs"
)


@ON_X86
def test_on_x86_it_takes_avx512():
    capability = torch.backends.cpu.get_cpu_capability()
    assert multiplies_bf16() is capability.startswith("AVX512")


@pytest.mark.parametrize("has_instructions", [True, False])
def test_auto_alone_depends_on_the_machine(monkeypatch, has_instructions):
    monkeypatch.setattr("moetrain.precision.multiplies_bf16", lambda: has_instructions)
    of_auto = "bf16" if has_instructions else "fp32"
    for precision, expected in [("auto", of_auto), *((p, p) for p in ("fp32", "bf16", "fp64"))]:
        assert computes_in(EngineConfig(precision=precision)) == expected


def test_ranks_that_differ_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrain.precision.multiplies_bf16", lambda: dist.get_rank() == 0)
    config = write_config(tmp_path, engine={"precision": "auto"})
    with pytest.raises(UserError, match=r"engine\.precision \(auto, here \w+\) of rank 1 .* fp32"):
        train_on(2, config)


def test_a_trace_tells_what_its_run_computed_in(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrain.precision.multiplies_bf16", lambda: True)
    config = write_config(tmp_path, engine={"precision": "auto"}, log={"trace": True})
    run, _ = train_on(1, config)
    assert Trace.open(run).settings.engine.precision == "bf16"
