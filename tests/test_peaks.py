import pytest
import torch

from moetrain import peaks


@pytest.mark.parametrize(
    ("name", "arithmetic", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "fp32", 60),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L40S", "fp32", 91.6),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_peaks_of_known_devices(name, arithmetic, tflops):
    assert peaks.peak_flops(name, arithmetic) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "Some Future GPU",
    ],
)
def test_a_device_that_only_looks_known_has_no_peak(name):
    assert peaks.peak_flops(name, "bf16") is None


def test_no_peak_without_a_known_arithmetic_or_gpu():
    assert peaks.peak_flops("NVIDIA H100 80GB HBM3", "fp64") is None
    assert peaks.device_peak_flops(torch.device("cpu"), "fp32") is None


def test_fp32_counts_as_tf32_only_where_torch_may_use_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device = torch.device("cuda", 0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert peaks.device_peak_flops(device, "fp32") == 67e12
        torch.set_float32_matmul_precision("high")
        assert peaks.device_peak_flops(device, "fp32") == 494.5e12
    finally:
        torch.set_float32_matmul_precision(before)
    assert peaks.device_peak_flops(device, "bf16") == 989.5e12
