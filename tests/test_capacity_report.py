"""The parts of `benchmarks/capacity.py` that compute and write: what is swept, advised and told."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweeps import ROWS, SWEEP, traced, trained  # before what it puts on the path

from moetrain import settings
from moetrain.config import Config
from moetrain.errors import UserError

from sweeping import plan, published, rates, table  # isort: skip
from sweeping.advice import LIVE_RULE, TRACE_RULE, advise, percent  # isort: skip
from sweeping.live import Facts, HeldOut, Live, Step, Trail  # isort: skip
from sweeping.writing import as_csv, as_dict, write  # isort: skip

BASE = Config.model_validate({"moe": {"router": "topk", "capacity_factor": 1.25}})


# ---------------------------------------------------------------- what is swept


def labels(world: int = 1, base: Config = BASE, **values: Any) -> tuple[list[str], list[str]]:
    able, refused = plan.variants(base, values, 100, world)
    return [v.label for v in able], [f"{one.label}: {one.reason}" for one in refused]


def test_every_combination_is_a_variant_and_named_by_what_differs() -> None:
    assert labels(capacity_factor=[1.0, None]) == (["1.0", "dropless"], [])
    assert labels() == (["1.25"], [])
    able, _ = labels(experts=[4, 8], group=["sequence", 64], capacity_factor=[1.0])
    assert able == [
        "E 4, group sequence, 1.0",
        "E 4, group 64, 1.0",
        "E 8, group sequence, 1.0",
        "E 8, group 64, 1.0",
    ]


def test_no_drop_policy_makes_a_second_dropless_variant() -> None:
    able, _ = labels(drop_policy=["position", "spill"], capacity_factor=[1.0, None])
    assert able == ["position, 1.0", "dropless", "spill, 1.0"]


def test_a_value_given_twice_is_one_variant() -> None:
    assert labels(capacity_factor=[1.0, 1.0]) == (["1.0"], [])


def test_what_cannot_run_is_told_in_the_words_of_the_project_and_the_rest_goes_on() -> None:
    able, refused = labels(router=["topk", "switch"], capacity_factor=[1.0, -1.0])
    assert able == ["topk, 1.0"]
    assert refused == [
        "topk, -1.0: moe.capacity_factor (-1.0) must be greater than 0 or 'auto' or null; "
        "the default is 1.25",
        "switch, 1.0: moe.top_k (2) must be 1 for moe.router switch; set moe.top_k to 1 or "
        "moe.router to topk",
        "switch, -1.0: moe.capacity_factor (-1.0) must be greater than 0 or 'auto' or null; "
        "the default is 1.25",
    ]


def test_a_sweep_of_nothing_that_can_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"K 9, 1.25: moe.top_k \(9\) must not exceed"):
        labels(top_k=[9, 10])
    with pytest.raises(UserError, match=r"1.25: .*parallel.ep \(2\)"):
        labels(base=settings.resolve(None, {"parallel": {"ep": 2}}))
    with pytest.raises(UserError, match=r"moe.experts \(0\) leaves no capacity"):
        labels(base=settings.resolve(None, {"moe": {"experts": 0}}))


def test_the_engine_of_a_run_does_not_matter_to_its_trace() -> None:
    base = settings.resolve(None, {"engine": {"kind": "deepspeed"}, "moe": {"router": "topk"}})
    assert labels(base=base, capacity_factor=[1.0, None]) == (["1.0", "dropless"], [])


def test_variants_train_as_long_as_the_schedule_and_save_nothing() -> None:
    (variant,), _ = plan.variants(BASE, {}, 100, 1)
    config = variant.config
    assert (config.train.steps, config.checkpoint.every, config.log.wandb) == (100, 0, "off")
    assert config.moe == BASE.moe


def test_the_own_setting_is_what_the_others_are_compared_with() -> None:
    able, _ = plan.variants(BASE, {"capacity_factor": [1.0, 1.25]}, 100, 1)
    assert plan.own(able, BASE).label == "1.25"
    able, _ = plan.variants(BASE, {"capacity_factor": [2.0, 3.0]}, 100, 1)
    assert plan.own(able, BASE).label == "2.0"


# ---------------------------------------------------------------- numbers


def line(kept: int, dropped: int, slots: int, **others: Any) -> Any:
    assigned = kept + dropped
    return {
        "assigned": assigned,
        "kept": kept,
        "spilled": 0,
        "dropped": dropped,
        "not_sampled": 0,
        "slots": slots,
        "drop_rate_by_choice": [0.0, 2 * dropped / assigned],
        "token_drop_rate": 0.25,
        "dropped_gate_mass": 0.5,
        "max_vio": 1.0,
        **others,
    }


STEPS = [[line(8, 0, 10), line(6, 2, 10)], [line(4, 4, 10), line(5, 1, 10, spilled=2, assigned=8)]]


def test_rates_are_of_counts_that_were_added_up() -> None:
    found = rates.rates(STEPS)
    assert found.drop_rate == 7 / 32
    assert found.spill_rate == 2 / 32
    assert found.padding_waste == 15 / 40
    assert found.effective_capacity_factor == 40 / 32
    assert found.drop_rate_by_choice == pytest.approx([0, (0 + 0.5 + 1 + 1 / 3) / 4])
    assert (found.token_drop_rate, found.dropped_gate_mass, found.max_vio) == (0.25, 0.5, 1.0)
    assert rates.drop_rate_by_layer(STEPS) == [4 / 16, 3 / 16]
    assert rates.late([*STEPS, *STEPS, STEPS[0]]) == [*STEPS, STEPS[0]]


def test_rows_that_are_multiplied_count_as_executed() -> None:
    config = settings.resolve(None, {"model": {"dim": 8}, "moe": {"expert_ffn_dim": 4}})
    of_row = 3 * 3 * 2 * 8 * 4  # three products, once forward and twice backward
    useful = of_row * (8 + 6 + 4 + 7) / 2
    assert rates.slots(STEPS) == [20, 20]
    assert rates.flops(STEPS, [16, 18], config) == (useful, of_row * 17)


def test_a_curve_is_read_between_its_points_and_ends_where_it_ends() -> None:
    curve = [(0, 4.0), (10, 2.0), (20, 1.0)]
    assert [table.at(curve, x) for x in (-1, 0, 5, 10, 15, 20, 25)] == [4, 4, 3, 2, 1.5, 1, 1]


def test_noise_is_what_neither_variants_nor_repeats_explain() -> None:
    repeats = [0.0, 0.5, 0.1]
    same = [trained(f, 0, 1, *(1 + f + r for r in repeats)) for f in (1.0, 2.0)]
    assert table.noise(same) == pytest.approx(0, abs=1e-12)
    # One variant gains 0.3, 0, 0 on the other: of such differences, the standard error of the mean.
    noisy = [same[0], replace(same[1], losses=[same[1].losses[0] + 0.3, *same[1].losses[1:]])]
    assert table.noise(noisy) == pytest.approx(math.sqrt(0.06 / 2) / math.sqrt(3))
    assert table.noise([trained(1.0, 0, 1, 2.0), trained(2.0, 0, 1, 2.0)]) is None
    assert table.noise(same[:1]) is None


def test_the_front_holds_what_no_other_variant_beats() -> None:
    beaten = trained(1.5, 0.01, 1.2, 2.1)
    rows = [trained(1.0, 0.1, 1.0, 2.1), trained(1.25, 0.01, 1.1, 2.0), beaten]
    assert [row.label for row in table.front(rows)] == ["1.0", "1.25"]
    assert table.front([*rows[:2], rows[0]]) == [*rows[:2], rows[0]]  # equals beat nobody
    assert table.front([trained(1.0, 0.1, 1.0, math.nan)]) == []
    traces = [traced(1.0, 0.1, 0.2), traced(1.25, 0.05, 0.3), traced(1.5, 0.05, 0.4)]
    assert [row.label for row in table.front(traces)] == ["1.0", "1.25"]


def test_rows_of_trainings_are_compared_turn_by_turn() -> None:
    able, _ = plan.variants(BASE, {"capacity_factor": [1.25, 2.0]}, 4, 1)

    def live(turns: list[float], losses: list[float]) -> Live:
        steps = [Step(step, 3.0, 1.0, STEPS[0], 20) for step in (3, 4)]
        held_out = [HeldOut(2 * n, loss, 0.1) for n, loss in enumerate(losses, start=1)]
        trail = Trail(steps, turns, held_out, HeldOut(4, 2.5, 0.0))
        return Live(Facts(64, 2048, 1024), [trail])

    # The machine was twice as slow in the second turn.
    seen = [live([1.0, 2.0], [4.0, 2.0]), live([1.25, 2.5], [4.0, 1.0])]
    base, other = table.live_rows(able, seen, able[0])
    assert (base.step_time_s, other.step_time_s) == (1.5, 1.875)
    assert other.time_ratio == (1.25, 1.25, 1.25)
    assert other.tokens_per_s == 32 * 256 / 1.875
    assert (base.loss, base.equal_time_loss) == (2.0, 2.0)
    assert other.loss == 1.0
    assert other.equal_time_loss == pytest.approx(4 - 3 * 1.6 / 2)  # after 1.6 of its 2 steps
    found = table.losses([base, other], "1.25")
    assert found.by_step == [[(2, 0.0), (4, 0.0)], [(2, 0.0), (4, -1.0)]]
    assert found.by_time[1] == [(0.0, 0.0), (3.0, pytest.approx(-0.4))]


# ---------------------------------------------------------------- advice


def test_the_fastest_is_recommended_that_loses_nothing() -> None:
    advice = advise(ROWS)
    assert advice.pick == "1.25"
    assert advice.headline == (
        "1.25: 0.4 % of assignments dropped, 4 % slower than 0.75, loss as at 2.0."
    )
    assert advice.rule == LIVE_RULE
    assert advice.reasons[1:] == [
        "0.75: 17.0 % dropped, 4 % faster than 1.25, loss 0.0605 above that of 2.0, more than "
        "noise.",
        "1.0: 6.0 % dropped, 3 % faster than 1.25, loss 0.0290 above that of 2.0, more than noise.",
        "2.0: 0.02 % dropped, 11 % slower than 1.25, the lowest loss.",
        "dropless: 0 % dropped, 30 % slower than 1.25, loss the same but for noise.",
    ]


@pytest.mark.parametrize(
    ("rows", "headline"),
    [
        (
            [trained(1.0, 0.02, 1.0, 2.0), trained(1.25, 0.0, 1.018, 2.0)],
            "1.25: 0 % of assignments dropped, 2 % slower than 1.0, loss as at 1.0.",
        ),
        (
            [trained(1.0, 0.02, 1.0, 2.3), trained(None, 0.0, 0.5, 2.0)],
            "dropless: 0 % of assignments dropped, 50 % faster than 1.0, the lowest loss.",
        ),
        (
            [trained(1.0, 0.0, 1.0, 2.0), trained(2.0, 0.0, 1.002, 2.0)],
            "1.0: 0 % of assignments dropped, as fast as 2.0, the lowest loss.",
        ),
        (
            [trained(1.0, 0.0, 0.5, math.nan), trained(2.0, 0.0, 1.0, 2.0)],
            "2.0: 0 % of assignments dropped.",
        ),
        ([trained(1.25, 0.004, 1.0, 2.0)], "1.25: 0.4 % of assignments dropped."),
    ],
    ids=["nearly as fast", "dropless is fastest", "nothing dropped", "one diverged", "one variant"],
)
def test_headlines(rows: list[Any], headline: str) -> None:
    assert advise(rows).headline == headline


def test_a_difference_in_speed_that_may_be_noise_is_none() -> None:
    tight = trained(1.0, 0.1, 1.0, 2.0, turn_ratios=[1.0, 1.0, 1.0, 1.0])
    slower = {"turn_ratios": [0.9, 1.3, 0.8, 1.24]}  # by 0.06 in the mean, give or take 0.12
    roomy = trained(2.0, 0.01, 1.06, 2.0, **slower)
    assert table.time_noise(roomy, tight) == pytest.approx(0.12356, rel=1e-4)
    assert advise([tight, roomy]).pick == "2.0"
    surely = trained(2.0, 0.01, 1.06, 2.0, turn_ratios=[1.06, 1.05, 1.07, 1.06])
    assert advise([tight, surely]).pick == "1.0"


def test_who_diverged_is_told_and_never_recommended() -> None:
    lost = trained(1.0, 0.0, 0.5, 2.0, math.nan)
    assert "1.0 diverged: its loss or gradient was not finite." in advise([lost, ROWS[2]]).reasons
    advice = advise([lost])
    assert advice.pick is None
    assert advice.headline.startswith("None: every variant diverged.")


def test_many_drops_and_a_single_repeat_are_cautioned_against() -> None:
    reasons = advise([trained(1.0, 0.2, 1.0, 2.0), trained(2.0, 0.01, 1.1, 2.0)]).reasons
    assert reasons[0].startswith("With a single repeat nothing is known of noise")
    assert "To be on the safe side take 2.0: 10 % slower than 1.0." in reasons


def test_of_a_trace_the_fewest_slots_that_drop_little_are_recommended() -> None:
    rows = [traced(1.0, 0.06, 0.1), traced(1.25, 0.009, 0.2), traced(2.0, 0.0, 0.5)]
    rows.append(traced(None, 0.0, 0.0))
    advice = advise(rows)
    assert (advice.pick, advice.rule) == ("1.25", TRACE_RULE)
    assert advice.headline == "1.25: 0.9 % of assignments dropped, 20.0 % of the slots empty."
    assert advise([rows[0], traced(0.75, 0.2, 0.0)]).pick == "1.0"
    assert advise([rows[0], rows[3]]).pick == "dropless"


def test_shares_are_told_with_as_many_digits_as_they_need() -> None:
    shares = 0.0, 0.00002, 0.0004, 0.004, 0.17, 1.0
    told = ["0 %", "under 0.01 %", "0.04 %", "0.4 %", "17.0 %", "100.0 %"]
    assert list(map(percent, shares)) == told


# ---------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of a sweep; a name that would be markup."""
    folder = tmp_path_factory.mktemp("sweep")
    what = "<b>not bold</b> & <script>alert(1)</script>"
    paths = write(SWEEP._replace(what=what), folder)
    names = {f"capacity.{kind}" for kind in ("html", "md", "json", "csv", "png")}
    assert {path.name for path in paths} == {path.name for path in folder.iterdir()} == names
    return folder


def test_the_page_needs_no_other_file(written: Path) -> None:
    text = (written / "capacity.html").read_text(encoding="utf-8")
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)
    assert len(own) < 200_000 < len(text)  # plotly.js is inside
    assert set(re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>\s]+)""", own)) == {"data:,"}
    assert "@import" not in own
    assert "url(" not in own
    assert "default-src 'none'" in own


def test_the_page_tells_everything(written: Path) -> None:
    text = (written / "capacity.html").read_text(encoding="utf-8")
    assert "1.25: 0.4 % of assignments dropped, 4 % slower than 0.75, loss as at 2.0." in text
    assert text.count('class="plotly-graph-div"') == 6
    for title in ("Results", "Drops over time", "Drops by layer", "Loss at equal time", "Quality"):
        assert f"<h2>{title}</h2>" in text
    assert "switch, 1.25: moe.top_k (2) must be 1 for moe.router switch" in text
    assert "&lt;b&gt;not bold&lt;/b&gt; &amp; &lt;script&gt;" in text
    assert "<b>not bold" not in text


def test_a_trace_has_a_page_without_loss_and_speed(tmp_path: Path) -> None:
    rows = [traced(1.0, 0.06, 0.1), traced(1.25, 0.009, 0.2)]
    write(SWEEP._replace(rows=rows), tmp_path)
    text = (tmp_path / "capacity.html").read_text(encoding="utf-8")
    assert text.count('class="plotly-graph-div"') == 3
    assert "tokens/s" not in text
    assert "Step time" not in text


def test_numbers_are_kept_as_they_were_measured(written: Path) -> None:
    kept = json.loads((written / "capacity.json").read_text())
    assert kept["advice"]["pick"] == "1.25"
    assert kept["front"] == ["0.75", "1.0", "1.25", "2.0", "dropless"]
    assert [one["loss"] for one in kept["variants"]] == [2.111, 2.0795, 2.0515, 2.0505, 2.051]
    lines = list(csv.DictReader(io.StringIO((written / "capacity.csv").read_text())))
    assert [one["capacity_factor"] for one in lines] == ["0.75", "1.0", "1.25", "2.0", "null"]
    assert lines[2]["losses"] == "2.001 2.102"
    assert float(lines[2]["drop_rate"]) == 0.004
    assert as_dict(trained(1.0, 0.0, 1.0, math.nan))["loss"] is None
    assert ",nan" not in as_csv([trained(1.0, 0.0, 1.0, math.nan)])


def test_published_tables_stand_beside_ours() -> None:
    uneven = replace(ROWS[2], rates=ROWS[2].rates._replace(token_drop_rate=0.004))
    rows = [*ROWS[:2], uneven, *ROWS[3:]]
    drops, quality, speed = published.tables(rows, "1.25", "so little")
    assert drops.rows[0] == ["0.75", "10.6 %", "15.6 %", "4.2 %", "17.0 %"]
    assert drops.rows[-1] == ["dropless", "", "", "0 %", "0 %"]
    assert drops.remarks[1:3] == [
        "Compared with those with balance loss, more tokens are dropped here at 1.25.",
        "Compared with those without, more tokens are dropped here at none of the shared factors.",
    ]
    assert quality.rows[1][:7] == ["1", "1.572", "1.561", "80.1", "62.8", "1.397", "1.392"]
    assert quality.rows[1][7:] == ["2.1395", "2.0795", "2.0989"]
    assert "rises there by 0.007 to 0.032, here by 0.089 after so little" in quality.remarks[1]
    assert speed.rows[-2] == ["2", "0.94", "1.06", "1.02", "1.14", "1.11"]
