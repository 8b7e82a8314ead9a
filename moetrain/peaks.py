"""What a GPU can do at most: dense peak FLOP/s by its name, from the vendors' datasheets."""

from __future__ import annotations

import re

import torch

# TFLOP/s without structured sparsity, by the words a device's name must contain; the more specific
# names come first.
_PEAK_TFLOPS: tuple[tuple[frozenset[str], dict[str, float]], ...] = (
    (frozenset({"GB200"}), {"bf16": 2500, "tf32": 1250, "fp32": 80}),
    (frozenset({"B200"}), {"bf16": 2250, "tf32": 1125, "fp32": 75}),
    (frozenset({"GH200"}), {"bf16": 989.5, "tf32": 494.5, "fp32": 67}),
    (frozenset({"H200", "NVL"}), {"bf16": 835.5, "tf32": 417.5, "fp32": 60}),
    (frozenset({"H200"}), {"bf16": 989.5, "tf32": 494.5, "fp32": 67}),
    (frozenset({"H100", "NVL"}), {"bf16": 835.5, "tf32": 417.5, "fp32": 60}),
    (frozenset({"H100", "PCIE"}), {"bf16": 756.5, "tf32": 378, "fp32": 51}),
    (frozenset({"H100"}), {"bf16": 989.5, "tf32": 494.5, "fp32": 67}),
    (frozenset({"A100"}), {"bf16": 312, "tf32": 156, "fp32": 19.5}),
    (frozenset({"L40S"}), {"bf16": 362.05, "tf32": 183, "fp32": 91.6}),
    (frozenset({"L4"}), {"bf16": 121, "tf32": 60, "fp32": 30.3}),
    (frozenset({"A10"}), {"bf16": 125, "tf32": 62.5, "fp32": 31.2}),
    (frozenset({"RTX", "4090"}), {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    (frozenset({"RTX", "3090"}), {"bf16": 71, "tf32": 35.6, "fp32": 35.6}),
    (frozenset({"MI300X"}), {"bf16": 1307.4, "tf32": 653.7, "fp32": 163.4}),
    (frozenset({"MI325X"}), {"bf16": 1307.4, "tf32": 653.7, "fp32": 163.4}),
)

# A slice of a device, or a slower chip that goes by the same number.
_ANOTHER_DEVICE = frozenset({"MIG", "LAPTOP", "MAX", "D", "TI"})


def peak_flops(device_name: str, arithmetic: str) -> float | None:
    """Dense peak FLOP/s of a GPU in `bf16`, `tf32` or `fp32`; None where it is not known."""
    words = frozenset(re.split(r"[\s_-]+", device_name.upper()))
    if words & _ANOTHER_DEVICE:
        return None
    for required, tflops in _PEAK_TFLOPS:
        if required <= words and arithmetic in tflops:
            return tflops[arithmetic] * 1e12
    return None


def device_name(device: torch.device) -> str:
    """What a GPU calls itself; of any other device its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak FLOP/s of `device` for a run in `precision` (bf16, fp32, fp64), or None.

    fp32 counts as TF32 where torch may use it for matrix products.
    """
    if device.type != "cuda":
        return None
    may_use_tf32 = torch.get_float32_matmul_precision() != "highest"
    arithmetic = "tf32" if precision == "fp32" and may_use_tf32 else precision
    return peak_flops(device_name(device), arithmetic)
