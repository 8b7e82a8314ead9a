import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import metrics
from moetrain.moe import Ledger
from moetrain.moe.capacity import plan_capacity, plan_dropless
from moetrain.moe.ledger import gate_mass
from moetrain.moe.ledger import ledger as count
from moetrain.moe.routing import gshard, topk
from moetrain.moe.spill import spill
from moetrain.objective import LayerMeans, Means
from moetrain.stragglers import RankTimes


def layer(outcome_EKO, *, row_E, tokens, slots, lost_tokens=0, gate_lost=0.0, by_rank=None):
    """A layer over all ranks; one rank unless their outcomes are given."""
    outcome = torch.tensor(outcome_EKO, dtype=torch.int64)
    numbers = map(torch.tensor, (int(outcome.sum()), row_E, tokens, lost_tokens, slots))
    by_rank = by_rank or (tuple(outcome.sum((0, 1)).tolist()),)
    return LayerMeans(Ledger(outcome, *numbers), gate_lost, by_rank)


# Three experts with two slots each, K=1, six tokens, five of them to expert 0: three are dropped.
CROWDED = layer(
    [[[2, 0, 3, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]],
    row_E=[2, 1, 0],
    tokens=6,
    slots=6,
    lost_tokens=3,
    gate_lost=0.4,
    by_rank=((1, 0, 3, 0), (2, 0, 0, 0)),
)
# The same layer, perfectly balanced.
BALANCED = layer(
    [[[2, 0, 0, 0]], [[2, 0, 0, 0]], [[2, 0, 0, 0]]], row_E=[2, 2, 2], tokens=6, slots=6
)
# Two experts, K=2, four tokens. Expert 0: two first choices kept, of two second ones one kept, one
# dropped. Expert 1: two first choices kept, of two second ones one spilled (to 0), one not sampled.
MIXED = layer(
    [[[2, 0, 0, 0], [1, 0, 1, 0]], [[2, 0, 0, 0], [0, 1, 0, 1]]],
    row_E=[4, 2],
    tokens=4,
    slots=8,
    gate_lost=0.1,
)

TIMES = RankTimes([0.5, 0.5, 0.5, 0.6], [0.1, 0.2, 0.1, 0.1], [0.01] * 4)
STEP = {"step_tokens": 1000, "step_time_s": 0.5, "rank_times": TIMES, "flops_per_token": 3e9}
SPEED = metrics.speed(**STEP, devices=4, peak_flops=None)


def train_line(layers, loss=2.5):
    return metrics.train_line(
        step=7,
        tokens=7000,
        bad_steps=2,
        spikes=1,
        is_spike=True,
        means=Means(loss, 1.1, 0.3, tuple(layers), 64),
        capacity_factors=[1.0 + n for n in range(len(layers))],
        grad_norm=0.9,
        lr=1e-3,
        speed=SPEED,
        memory_gib=1.5,
    )


def test_a_line_has_the_documented_fields_in_order():
    assert list(train_line([CROWDED])) == [
        *["step", "tokens", "loss", "balance_loss", "z_loss", "grad_norm", "lr"],
        *["drop_rate", "token_drop_rate", "dropped_gate_mass", "padding_waste"],
        *["effective_capacity_factor", "max_vio", "load_cv", "load_entropy", "dead_experts"],
        *["bad_steps", "spikes", "is_spike", "tokens_per_s", "tflops_per_device", "mfu"],
        *["step_time_s", "step_time_s_by_rank", "data_s_by_rank", "probe_s_by_rank"],
        *["memory_gib", "layers"],
    ]


def test_every_figure_of_a_crowded_layer():
    line = metrics.layer_line(CROWDED, 1.5)
    cv = pytest.approx(math.sqrt(((5 - 2) ** 2 + (1 - 2) ** 2 + (0 - 2) ** 2) / 3) / 2)
    # shares 5/6 and 1/6 of three experts
    entropy = pytest.approx(math.exp(-(5 / 6 * math.log(5 / 6) + 1 / 6 * math.log(1 / 6))) / 3)
    assert line == {
        "assigned": 6,
        "kept": 3,
        "spilled": 0,
        "dropped": 3,
        "not_sampled": 0,
        "lost_tokens": 3,
        "slots": 6,
        "drop_rate": 0.5,
        "drop_rate_by_choice": [0.5],
        "token_drop_rate": 0.5,
        "dropped_gate_mass": 0.4,
        "padding_waste": 0.5,
        "capacity_factor": 1.5,
        "effective_capacity_factor": 1.0,
        "max_vio": 1.5,  # (5 - 2) / 2
        "load_cv": cv,  # 1.0801
        "load_entropy": entropy,  # 0.5231
        "dead_experts": 1,
        "load": [5, 1, 0],
        "kept_load": [2, 1, 0],
        "row_load": [2, 1, 0],
        "outcomes_by_rank": [[1, 0, 3, 0], [2, 0, 0, 0]],
    }
    assert line["load_cv"] == pytest.approx(1.08012, abs=1e-5)
    assert line["load_entropy"] == pytest.approx(0.523064, abs=1e-6)
    counts = [line["assigned"], line["slots"], *line["load"], *line["row_load"]]
    counts += [number for rank in line["outcomes_by_rank"] for number in rank]
    assert all(type(number) is int for number in counts)


def test_every_outcome_has_its_own_count():
    line = metrics.layer_line(MIXED, 1.5)
    assert (line["kept"], line["spilled"], line["dropped"], line["not_sampled"]) == (5, 1, 1, 1)
    assert line["drop_rate"] == 1 / 8
    assert line["drop_rate_by_choice"] == [0, 1 / 4]
    assert line["load"] == [4, 4]
    assert line["kept_load"] == [3, 2]
    assert line["row_load"] == [4, 2]
    assert line["padding_waste"] == 2 / 8
    assert line["effective_capacity_factor"] == 1
    assert (line["max_vio"], line["load_cv"], line["dead_experts"]) == (0, 0, 0)
    assert line["load_entropy"] == pytest.approx(1)


def test_one_expert_with_everything_is_as_uneven_as_can_be():
    line = metrics.layer_line(
        layer([[[6, 0, 0, 0]], [[0] * 4]], row_E=[6, 0], tokens=6, slots=12), 2.0
    )
    assert (line["max_vio"], line["load_cv"], line["load_entropy"]) == (1, 1, 0.5)
    assert (line["dead_experts"], line["padding_waste"]) == (1, 0.5)
    assert line["effective_capacity_factor"] == 2


def test_rates_weigh_layers_by_their_counts_and_the_rest_are_means_or_sums():
    layers = [CROWDED, BALANCED, MIXED]
    line = train_line(layers)
    assert line["drop_rate"] == 4 / 20
    assert line["token_drop_rate"] == 3 / 16
    assert line["dropped_gate_mass"] == pytest.approx((0.4 + 0 + 0.1) / 3)
    assert line["padding_waste"] == pytest.approx((0.5 + 0 + 0.25) / 3)
    assert line["effective_capacity_factor"] == 1
    assert line["max_vio"] == pytest.approx((1.5 + 0 + 0) / 3)
    assert line["load_cv"] == pytest.approx(1.0801234 / 3)
    assert line["load_entropy"] == pytest.approx((0.5230642 + 1 + 1) / 3)
    assert line["dead_experts"] == 1
    assert (line["bad_steps"], line["spikes"], line["is_spike"]) == (2, 1, True)
    assert line["layers"] == [metrics.layer_line(one, 1.0 + n) for n, one in enumerate(layers)]


def test_a_dense_model_has_no_layers_and_no_drops():
    line = train_line([])
    assert line["layers"] == []
    names = ["drop_rate", "token_drop_rate", "dropped_gate_mass", "padding_waste", "max_vio"]
    names += ["effective_capacity_factor", "load_cv", "load_entropy", "dead_experts"]
    assert [line[name] for name in names] == [0] * len(names)


def test_a_layer_without_a_valid_token_has_rates_of_zero():
    line = metrics.layer_line(layer([[[0] * 4], [[0] * 4]], row_E=[0, 0], tokens=0, slots=0), None)
    rates = ["drop_rate", "token_drop_rate", "padding_waste", "effective_capacity_factor"]
    assert [line[name] for name in [*rates, "max_vio", "load_cv", "load_entropy"]] == [0] * 7
    assert line["drop_rate_by_choice"] == [0]
    assert line["dead_experts"] == 2


def test_what_is_not_finite_stays_so_and_the_counts_are_there():
    line = train_line([CROWDED._replace(dropped_gate_mass=math.nan)], loss=math.nan)
    assert math.isnan(line["loss"])
    assert math.isnan(line["dropped_gate_mass"])
    assert line["drop_rate"] == 0.5


def test_counts_beyond_the_exact_range_of_floats_stay_exact():
    big = 2**53 + 1
    line = metrics.layer_line(
        layer(
            [[[big, 0, 0, 0]], [[0, 0, 2, 0]]],
            row_E=[big, 0],
            tokens=big + 2,
            slots=big,
            lost_tokens=2,
        ),
        None,
    )
    assert (line["assigned"], line["load"], line["row_load"]) == (big + 2, [big, 2], [big, 0])


BROKEN = {
    "assigned too many": (MIXED, {"assigned": 9}, "disagree"),
    "assigned too few": (MIXED, {"assigned": 7}, "disagree"),
    "a choice without outcome": (
        MIXED,
        {"outcome_EKO": [[[2, 0, 0, 0], [1, 0, 0, 0]], [[2, 0, 0, 0], [0, 1, 0, 1]]]},
        "disagree",
    ),
    "a drop counted as kept": (
        CROWDED,
        {"outcome_EKO": [[[3, 0, 2, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]]},
        "disagree",
    ),
    "negative cells that cancel out": (
        CROWDED,
        {"outcome_EKO": [[[2, 0, 4, 0]], [[1, 0, 0, 0]], [[0, 0, -1, 0]]]},
        "negative",
    ),
    "a row too many": (CROWDED, {"row_E": [2, 1, 1]}, "disagree"),
    "a row too few": (MIXED, {"row_E": [3, 2]}, "disagree"),
    "a kept row with another expert": (MIXED, {"row_E": [2, 4]}, "disagree"),
    "more rows than slots": (CROWDED, {"slots": 2}, "disagree"),
    "too few tokens": (CROWDED, {"tokens": 5}, "tokens do not add up"),
    "too many tokens": (CROWDED, {"tokens": 7}, "tokens do not add up"),
    "too few lost tokens": (CROWDED, {"lost_tokens": 2}, "tokens do not add up"),
    "too many lost tokens": (CROWDED, {"lost_tokens": 4}, "tokens do not add up"),
    "more lost tokens than tokens": (MIXED, {"lost_tokens": 5}, "tokens do not add up"),
    "fewer lost tokens than none": (MIXED, {"lost_tokens": -1}, "tokens do not add up"),
}


@pytest.mark.parametrize(("whole", "changes", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_ledger_that_does_not_conserve_is_refused(whole, changes, message):
    changes = {name: torch.tensor(value) for name, value in changes.items()}
    broken = whole._replace(ledger=whole.ledger._replace(**changes))
    train_line([whole])
    with pytest.raises(AssertionError, match=message):
        train_line([whole, broken])


@pytest.mark.parametrize(
    "by_rank",
    [
        ((1, 0, 3, 0), (1, 0, 0, 0)),  # a rank's count is missing
        ((1, 0, 2, 0), (2, 1, 0, 0)),  # a drop of one is a spill of the other
        ((3, 0, 3, 0), (3, 0, 3, 0)),  # counted twice
    ],
)
def test_ranks_that_do_not_add_up_are_refused(by_rank):
    with pytest.raises(AssertionError, match="ranks do not add up"):
        train_line([CROWDED._replace(outcomes_by_rank=by_rank)])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(2, 6),
    st.integers(1, 3),
    st.none() | st.integers(1, 4),
    st.integers(0, 99),
    st.sampled_from(["topk", "gshard", "spill"]),
)
def test_lines_of_real_routing_agree_with_counting_by_hand(groups, experts, k, slots, seed, kind):
    k, group_size = (2 if kind == "gshard" else min(k, experts)), 4
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(groups * group_size, experts, generator=generator)
    valid_T = torch.rand(groups * group_size, generator=generator) < 0.8
    if kind == "gshard":
        routing = gshard(logits_TE, valid_T, torch.rand(len(valid_T), generator=generator))
    else:
        routing = topk(logits_TE, valid_T, k, renormalize=True)
    settled = spill(routing, group_size, slots, 1) if kind == "spill" and slots else routing
    plan = plan_dropless(settled) if slots is None else plan_capacity(settled, group_size, slots)
    book, (total, lost) = count(routing, settled, plan), gate_mass(routing, plan)
    share = float(lost / total) if total else 0.0
    outcomes = (tuple(book.outcome_EKO.sum((0, 1)).tolist()),)
    line = metrics.layer_line(LayerMeans(book, share, outcomes), None)

    pairs = [(t, j) for t in valid_T.nonzero().flatten().tolist() for j in range(k)]
    chosen = {pair: int(routing.expert_TK[pair]) for pair in pairs}
    rows = {pair for pair in pairs if plan.row_TK[pair] < plan.source_R.numel()}
    ran = [int(settled.expert_TK[pair]) for pair in rows]
    sampled = {pair for pair in pairs if routing.sampled_TK[pair]}
    dropped = sampled - rows
    spilled = [pair for pair in rows if settled.expert_TK[pair] != chosen[pair]]
    assert line["load"] == [list(chosen.values()).count(expert) for expert in range(experts)]
    assert line["row_load"] == [ran.count(expert) for expert in range(experts)]
    assert (line["kept"], line["spilled"]) == (len(rows) - len(spilled), len(spilled))
    assert (line["dropped"], line["not_sampled"]) == (len(dropped), len(pairs) - len(sampled))
    assert line["drop_rate_by_choice"] == [
        pytest.approx(sum(pair[1] == j for pair in dropped) / max(1, len(pairs) / k))
        for j in range(k)
    ]
    alive = {t for t, _ in rows}
    assert line["lost_tokens"] == len({t for t, _ in pairs} - alive)
    weights = {pair: float(routing.gate_TK[pair]) for pair in sampled}
    assert line["dropped_gate_mass"] == pytest.approx(
        sum(weights[pair] for pair in dropped) / max(1e-9, sum(weights.values())), abs=1e-6
    )
    busy_groups = int(valid_T.view(groups, group_size).any(1).sum())
    provided = len(rows) if slots is None else busy_groups * experts * slots
    assert line["slots"] == provided
    assert line["padding_waste"] == pytest.approx((provided - len(rows)) / max(1, provided))


def test_an_evaluation_line_carries_no_training_loss():
    means = Means(3.0, 1.0, 1.0, (CROWDED, BALANCED), 64)
    line = metrics.eval_line(step=20, means=means, nats_per_byte=0.9)
    assert line == {
        "step": 20,
        "eval_loss": 3.0,
        "eval_nats_per_byte": 0.9,
        "eval_drop_rate": 0.25,
    }


def test_speed_of_a_step():
    known = metrics.speed(**STEP, devices=4, peak_flops=6e12)
    assert known == {
        "tokens_per_s": 2000,
        "tflops_per_device": 1.5,
        "mfu": 0.25,
        "step_time_s": 0.5,
        "step_time_s_by_rank": [0.5, 0.5, 0.5, 0.6],
        "data_s_by_rank": [0.1, 0.2, 0.1, 0.1],
        "probe_s_by_rank": [0.01] * 4,
    }
    assert SPEED["mfu"] is None


def test_memory_on_cpu_is_the_peak_of_this_process():
    before = metrics.memory_gib(torch.device("cpu"))
    ballast = torch.ones(2**26)  # 256 MiB, written to
    after = metrics.memory_gib(torch.device("cpu"))
    del ballast
    assert 0.05 < before <= after
    assert after > 0.3, f"{after} GiB on {sys.platform} after allocating 0.25 GiB"
