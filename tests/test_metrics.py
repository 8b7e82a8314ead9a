import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import metrics
from moetrain.moe.capacity import Ledger, plan_capacity
from moetrain.moe.capacity import ledger as count
from moetrain.moe.routing import topk


def make_ledger(outcome_EKO, tokens, lost_tokens=0, slots=None) -> Ledger:
    outcome = torch.tensor(outcome_EKO, dtype=torch.int64)
    if slots is None:
        slots = int(outcome[:, :, :2].sum())
    return Ledger(outcome, torch.tensor(tokens), torch.tensor(lost_tokens), torch.tensor(slots))


# Three experts with two slots each, K=1, six tokens, five of them to expert 0: three are dropped.
CROWDED = make_ledger(
    [[[2, 0, 3, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]], tokens=6, lost_tokens=3, slots=6
)
# The same layer, perfectly balanced.
BALANCED = make_ledger([[[2, 0, 0, 0]], [[2, 0, 0, 0]], [[2, 0, 0, 0]]], tokens=6, slots=6)
# Two experts, K=2, four tokens: one second choice spilled, one dropped, one not sampled.
MIXED = make_ledger([[[2, 0, 0, 0], [1, 0, 1, 0]], [[2, 0, 0, 0], [0, 1, 0, 1]]], tokens=4, slots=8)

SPEED = metrics.speed(
    step_tokens=1000, step_time_s=0.5, flops_per_token=3e9, devices=4, peak_flops=None
)


def train_line(ledgers):
    return metrics.train_line(
        step=7,
        tokens=7000,
        loss=2.5,
        balance_loss=1.1,
        z_loss=0.3,
        grad_norm=0.9,
        lr=1e-3,
        ledgers=ledgers,
        speed=SPEED,
        memory_gib=1.5,
    )


def test_a_line_has_the_documented_fields_in_order():
    assert list(train_line([CROWDED])) == [
        *["step", "tokens", "loss", "balance_loss", "z_loss", "grad_norm", "lr"],
        *["drop_rate", "token_drop_rate", "max_vio"],
        *["tokens_per_s", "tflops_per_device", "mfu", "step_time_s", "memory_gib", "layers"],
    ]


def test_counts_of_a_crowded_layer_are_exact():
    layer = metrics.layer_line(CROWDED)
    assert layer == {
        "assigned": 6,
        "kept": 3,
        "spilled": 0,
        "dropped": 3,
        "not_sampled": 0,
        "lost_tokens": 3,
        "slots": 6,
        "drop_rate": 0.5,
        "max_vio": 1.5,  # (5 - 2) / 2
        "effective_capacity_factor": 1.0,
        "dropped_by_choice": [3],
        "load": [5, 1, 0],
        "kept_load": [2, 1, 0],
    }
    counts = [layer["assigned"], layer["slots"], *layer["load"], *layer["dropped_by_choice"]]
    assert all(type(count) is int for count in counts)


def test_every_outcome_has_its_own_count():
    layer = metrics.layer_line(MIXED)
    assert (layer["kept"], layer["spilled"], layer["dropped"], layer["not_sampled"]) == (5, 1, 1, 1)
    assert layer["dropped_by_choice"] == [0, 1]
    assert layer["load"] == [4, 4]
    assert layer["kept_load"] == [3, 2]
    assert layer["max_vio"] == 0


def test_rates_weigh_layers_by_their_counts_and_max_vio_is_their_mean():
    line = train_line([CROWDED, BALANCED, MIXED])
    assert line["drop_rate"] == 4 / 20
    assert line["token_drop_rate"] == 3 / 16
    assert line["max_vio"] == pytest.approx((1.5 + 0 + 0) / 3)
    assert [layer["assigned"] for layer in line["layers"]] == [6, 6, 8]


def test_a_dense_model_has_no_layers_and_no_drops():
    line = train_line([])
    assert line["layers"] == []
    assert line["drop_rate"] == line["token_drop_rate"] == line["max_vio"] == 0


def test_a_layer_without_a_valid_token_has_rates_of_zero():
    layer = metrics.layer_line(make_ledger([[[0] * 4], [[0] * 4]], tokens=0, slots=4))
    assert (layer["drop_rate"], layer["max_vio"], layer["effective_capacity_factor"]) == (0, 0, 0)


def test_counts_beyond_the_exact_range_of_floats_stay_exact():
    big = 2**53 + 1
    layer = metrics.layer_line(make_ledger([[[big, 0, 0, 0]], [[0, 0, 2, 0]]], tokens=big + 2))
    assert (layer["assigned"], layer["load"]) == (big + 2, [big, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 5}, "5 tokens"),
        ({"lost_tokens": 7}, "7 of 6 tokens lost"),
        ({"slots": 2}, "more kept than slots"),
        ({"outcome_EKO": [[[2, 0, 4, 0]], [[1, 0, 0, 0]], [[0, 0, -1, 0]]]}, "negative"),
        ({"outcome_EKO": [[[4, 0, 4, 0]], [[1, 0, 0, 0]], [[-3, 0, 0, 0]]]}, "negative"),
    ],
)
def test_a_ledger_that_does_not_conserve_is_refused(changes, message):
    broken = CROWDED._replace(**{name: torch.tensor(value) for name, value in changes.items()})
    with pytest.raises(AssertionError, match=message):
        train_line([broken])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.integers(2, 6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99)
)
def test_lines_of_real_routing_agree_with_counting_by_hand(groups, experts, k, slots, seed):
    k, group_size = min(k, experts), 4
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(groups * group_size, experts, generator=generator)
    valid_T = torch.rand(groups * group_size, generator=generator) < 0.8
    routing = topk(logits_TE, valid_T, k, renormalize=True)
    plan = plan_capacity(routing, group_size, slots)
    layer = metrics.layer_line(count(routing, plan))

    valid = valid_T.nonzero().flatten().tolist()
    assigned = [expert for t in valid for expert in routing.expert_TK[t].tolist()]
    has_row = plan.row_TK < plan.source_R.numel()
    assert layer["load"] == [assigned.count(expert) for expert in range(experts)]
    assert layer["kept"] == sum(int(has_row[t].sum()) for t in valid)
    assert layer["dropped"] == len(assigned) - layer["kept"]
    assert layer["lost_tokens"] == sum(not has_row[t].any() for t in valid)
    assert layer["slots"] == groups * experts * slots


def test_an_evaluation_line_carries_no_training_loss():
    line = metrics.eval_line(step=20, loss=3.0, nats_per_byte=0.9, ledgers=[CROWDED, BALANCED])
    assert line == {
        "step": 20,
        "eval_loss": 3.0,
        "eval_nats_per_byte": 0.9,
        "eval_drop_rate": 0.25,
    }


def test_speed_of_a_step():
    known = metrics.speed(
        step_tokens=1000, step_time_s=0.5, flops_per_token=3e9, devices=4, peak_flops=6e12
    )
    assert known == {
        "tokens_per_s": 2000,
        "tflops_per_device": 1.5,
        "mfu": 0.25,
        "step_time_s": 0.5,
    }
    assert SPEED["mfu"] is None


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
    assert metrics.peak_flops(name, arithmetic) == pytest.approx(tflops * 1e12)


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
    assert metrics.peak_flops(name, "bf16") is None


def test_no_peak_without_a_known_arithmetic_or_gpu():
    assert metrics.peak_flops("NVIDIA H100 80GB HBM3", "fp64") is None
    assert metrics.device_peak_flops(torch.device("cpu"), "fp32") is None


def test_fp32_counts_as_tf32_only_where_torch_may_use_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device = torch.device("cuda", 0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert metrics.device_peak_flops(device, "fp32") == 67e12
        torch.set_float32_matmul_precision("high")
        assert metrics.device_peak_flops(device, "fp32") == 494.5e12
    finally:
        torch.set_float32_matmul_precision(before)
    assert metrics.device_peak_flops(device, "bf16") == 989.5e12


def test_memory_on_cpu_is_the_peak_of_this_process():
    before = metrics.memory_gib(torch.device("cpu"))
    ballast = torch.ones(2**26)  # 256 MiB, written to
    after = metrics.memory_gib(torch.device("cpu"))
    del ballast
    assert 0.05 < before <= after
    assert after > 0.3, f"{after} GiB on {sys.platform} after allocating 0.25 GiB"
