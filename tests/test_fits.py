"""Lines through made-up measurements, bytes of collectives, and points of growing layers."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import fits  # noqa: E402
import scaling  # noqa: E402
from harness import AbsentError  # noqa: E402

from moetrain.testing import simulate_ranks  # noqa: E402

# By its path: there is a module of that name here.
collectives = SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "collectives.py")))

SIZES = [1, 2, 4, 8]


def test_an_exponent_is_recovered_whatever_the_scale() -> None:
    rounds = [[scale * size**1.3 for size in SIZES] for scale in (0.5, 1, 7)]
    fitted = fits.exponent(SIZES, rounds)
    assert fitted == pytest.approx((1.3, 1.3, 1.3))
    assert fitted.show() == "1.30 (1.30 to 1.30)"


def test_the_range_of_an_exponent_is_students() -> None:
    """Slopes 0.9, 1.0 and 1.1: mean 1, standard deviation 0.1, t = 4.303 for two degrees."""
    rounds = [[size**slope for size in SIZES] for slope in (0.9, 1.0, 1.1)]
    half = 4.303 * 0.1 / math.sqrt(3)
    assert fits.exponent(SIZES, rounds) == pytest.approx((1, 1 - half, 1 + half))
    value, low, high = fits.exponent(SIZES, rounds[:1])
    assert value == pytest.approx(0.9)
    assert math.isnan(low)
    assert math.isnan(high)


def test_latency_and_bandwidth_are_recovered() -> None:
    """20 µs and 4 GB/s: half of it at 80,000 bytes."""
    messages = [2.0**n for n in range(8, 27, 2)]
    fitted = fits.transport(messages, [20e-6 + n / 4e9 for n in messages])
    assert fitted[:2] == pytest.approx((20e-6, 4e9))
    assert fitted.off < 1e-9
    assert fitted.half == pytest.approx(80_000)


def test_a_latency_is_never_below_zero() -> None:
    """Seconds that grow as n^1.2 would start below zero on a straight line."""
    messages = [2.0**n for n in range(10, 20)]
    fitted = fits.transport(messages, [1e-9 * n**1.2 for n in messages])
    assert fitted.latency == 0
    assert 1e9 * messages[-1] ** -0.2 < fitted.bandwidth < 1e9 * messages[0] ** -0.2
    assert fitted.off > 0.1


@pytest.mark.parametrize(
    ("message", "ranks", "rows", "sent"),
    [(1024, 2, 8, 512), (1024, 4, 8, 768), (1000, 3, 9, 768), (1, 8, 8, 896)],
)
def test_bytes_that_leave_a_rank(message: int, ranks: int, rows: int, sent: float) -> None:
    """Rows of 128 bytes, as many for every rank, of which one share stays."""
    assert collectives.rows_of(message, ranks) == rows
    assert collectives.leaving(rows * 128, ranks) == pytest.approx(sent)


def test_uneven_parts_are_a_message_in_all() -> None:
    assert collectives.uneven_parts(90, 2) == [60, 30]
    assert collectives.uneven_parts(110, 3) == [60, 30, 20]
    parts = collectives.uneven_parts(8, 8)
    assert sum(parts) == 8
    assert parts == sorted(parts, reverse=True)


def test_sizes_end_at_the_largest() -> None:
    assert collectives.sizes(1024, 2**16) == [1024, 4096, 2**14, 2**16]
    assert collectives.sizes(1000, 10_000) == [2500, 10_000]


def test_bytes_are_shown_in_units() -> None:
    shown = [collectives.show_bytes(n) for n in (512, 1024, 1536, 250_000, 2**26, 2**41)]
    assert shown == ["512 B", "1 KiB", "1.5 KiB", "244 KiB", "64 MiB", "2048 GiB"]


def test_curves_grow_in_one_thing_at_the_same_active_size() -> None:
    for name, curve in scaling.curves("cpu", "bf16").items():
        sizes = [getattr(point, curve.field) for point in curve.points]
        assert sizes == sorted(set(sizes)), name
        active = {point.top_k * point.expert_dim for point in curve.points}
        assert (len(active) == 1) == (name != "choices"), name
        assert all(point.experts % point.ranks == 0 for point in curve.points), name
        least = scaling.SEQUENCE
        assert all(p.tokens // p.ranks % least == 0 for p in curve.points), name
    experts, finer = (scaling.curves("cpu", "bf16")[name].points for name in ("experts", "finer"))
    assert [point.experts for point in experts] == [point.experts for point in finer]
    assert len({point.experts * point.expert_dim for point in finer}) == 1


def test_a_promise_is_kept_or_not() -> None:
    tokens, experts, ranks = (
        scaling.curves("cpu", "bf16")[n] for n in ("tokens", "experts", "ranks")
    )
    assert tokens.is_met(1.05, growth=99)
    assert not tokens.is_met(1.051, growth=1)
    assert experts.is_met(99, growth=1.10)
    assert not experts.is_met(0, growth=1.11)
    assert ranks.is_met(0, growth=1) is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_takes_its_step_on_its_ranks(ranks: int) -> None:
    point = scaling.Point(tokens=1024, experts=4, dim=16, expert_dim=16, ranks=ranks)

    def one_rank() -> dict[str, int]:
        products = scaling.build(0, scaling.limit, [point], torch.device("cpu"))
        products.step()
        case = scaling.build(0, scaling.LayerStep, [point], torch.device("cpu"))
        case.step()
        return case.facts()

    facts = simulate_ranks(ranks, one_rank)
    assert sum(of_one["assigned"] for of_one in facts) == 2 * 1024
    assert 0.8 < sum(of_one["kept"] for of_one in facts) / (2 * 1024) <= 1
    with pytest.raises(AbsentError, match="fewer points"):
        scaling.build(1, scaling.LayerStep, [point], torch.device("cpu"))


def test_ranks_have_processes_of_their_own() -> None:
    every = scaling.curves("cpu", "bf16")
    alone, spread = scaling.teams(list(every.values()))
    assert alone == ([1] * 5, [every[n] for n in scaling.NAMES if n != "ranks"])
    assert spread == ([1, 2, 4], [every["ranks"]])
