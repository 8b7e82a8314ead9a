"""What a run computes in, by its settings and by what this machine has instructions for."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from moetrain.config import Config, EngineConfig

Precision = Literal["fp32", "bf16", "fp64"]
COMPUTED_IN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def computes_in(engine: EngineConfig) -> Precision:
    """What `engine.precision` comes to on this machine."""
    if engine.precision == "auto":
        return "bf16" if multiplies_bf16() else "fp32"
    return engine.precision


def compute_dtype(engine: EngineConfig) -> torch.dtype:
    """The dtype of what is multiplied."""
    return COMPUTED_IN[computes_in(engine)]


def spelled_out(config: Config) -> Config:
    """The settings with `engine.precision` as it is here, for whoever reads them elsewhere."""
    engine = config.engine.model_copy(update={"precision": computes_in(config.engine)})
    return config.model_copy(update={"engine": engine})


@cache
def multiplies_bf16(on_cpu: bool = False) -> bool:
    """Whether the device that training takes here has instructions for products of bf16.

    Others emulate them: CPUs without AVX-512 number by number, far slower than fp32. `on_cpu` asks
    of the CPU whatever device is there.
    """
    if not on_cpu and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_onednn = torch.backends.mkldnn.is_available()
    return has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
