"""Randomness that is a function of what it is for, and of nothing else."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_draws import hashed, hashed_token

from moetrain.moe import Draws, keyed

# ---- uniforms ------------------------------------------------------------------------------------


def draws(tokens: int, seed: int = 1, step: int = 1, first: int = 0) -> Draws:
    return Draws(keyed.step_key(seed, step), torch.arange(first, first + tokens))


def test_a_draw_is_a_pure_function() -> None:
    """Order, neighbours and torch's own generators make no difference."""
    torch.manual_seed(1)
    whole = keyed.uniform(draws(100), 2, "jitter")
    torch.manual_seed(2)
    torch.rand(7)
    order = torch.randperm(100)
    shuffled = Draws(keyed.step_key(1, 1), order)
    assert torch.equal(keyed.uniform(shuffled, 2, "jitter"), whole[order])
    assert torch.equal(keyed.uniform(draws(30, first=50), 2, "jitter"), whole[50:80])


def test_drawing_leaves_torchs_generator_alone() -> None:
    before = torch.random.get_rng_state()
    keyed.uniform(draws(100), 0, "second expert")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_part_of_the_key_matters() -> None:
    """Streams that differ in one part are as uncorrelated as independent ones would be."""
    n = 20_000
    streams = {
        "reference": keyed.uniform(draws(n), 0, "jitter"),
        "seed": keyed.uniform(draws(n, seed=2), 0, "jitter"),
        "step": keyed.uniform(draws(n, step=2), 0, "jitter"),
        "seed and step swapped": keyed.uniform(draws(n, seed=1, step=0), 0, "jitter"),
        "layer": keyed.uniform(draws(n), 1, "jitter"),
        "purpose": keyed.uniform(draws(n), 0, "second expert"),
        "token": keyed.uniform(draws(n, first=1), 0, "jitter"),
        "far token": keyed.uniform(draws(n, first=1 << 40), 0, "jitter"),
        "column 0": keyed.uniform(draws(n), 0, "jitter", 2)[:, 0],
        "column 1": keyed.uniform(draws(n), 0, "jitter", 2)[:, 1],
    }
    correlation = torch.corrcoef(torch.stack(list(streams.values())).double())
    apart = correlation - torch.eye(len(streams), dtype=torch.float64)
    assert apart.abs().max() < 5 / math.sqrt(n), streams.keys()


def test_the_hash_is_splitmix64() -> None:
    """The published first outputs for seed 1234567; a draw must not change between versions."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    outputs = keyed.fold(torch.tensor(1234567), torch.arange(5))
    assert [value % (1 << 64) for value in outputs.tolist()] == published


def test_seed_and_step_do_not_trade_places() -> None:
    assert keyed.step_key(3, 5) != keyed.step_key(5, 3)


@pytest.mark.parametrize("columns", [None, 16])
def test_draws_are_uniform(columns: int | None) -> None:
    """Range, mean, variance, and a chi-square over 64 equal bins (mean 63, deviation 11.2)."""
    n = 64_000
    u = keyed.uniform(draws(n if columns is None else n // columns), 0, "jitter", columns)
    assert u.dtype == torch.float32
    assert u.shape == ((n,) if columns is None else (n // columns, columns))
    u = u.flatten().double()
    assert 0 <= u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    assert abs(u.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    bins = torch.histc(u, 64, 0, 1)
    assert ((bins - n / 64) ** 2 / (n / 64)).sum() < 63 + 6 * 11.2


def test_draws_over_steps_are_uniform_for_one_token() -> None:
    n = 4_000
    u = torch.stack([keyed.uniform(draws(1, step=s), 0, "second expert")[0] for s in range(n)])
    u = u.double()
    assert abs(u.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < 5 / math.sqrt(n)


# ---- against arithmetic in unbounded integers ----------------------------------------------------


NUMBERS = st.integers(0, 2**62)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    step=st.integers(0, 2**31),
    layer=st.integers(0, 200),
    purpose=st.text(max_size=8),
    token=NUMBERS,
    column=st.integers(0, 300),
)
def test_draws_are_those_of_plain_integers(
    seed: int, step: int, layer: int, purpose: str, token: int, column: int
) -> None:
    """With and without columns, to the bit, for ids as large as they come."""
    some = Draws(keyed.step_key(seed, step), torch.tensor([token]))
    key = hashed_token(seed, step, layer, purpose, token)
    assert keyed.uniform(some, layer, purpose).item() == (key >> 40) / 2**24
    cell = hashed(key, column)
    assert keyed.uniform(some, layer, purpose, column + 1)[0, column] == (cell >> 40) / 2**24
    midpoint = (((cell >> 11) & (2**53 - 1)) + 0.5) / 2**53
    expected = torch.special.ndtri(torch.tensor(midpoint, dtype=torch.float64)).float()
    assert keyed.normal(some, layer, purpose, column + 1)[0, column] == expected


# ---- any order, any sharding ---------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    order=st.permutations(range(24)),
    cuts=st.lists(st.integers(0, 24), max_size=4),
    columns=st.sampled_from([None, 1, 5]),
    kind=st.sampled_from(["uniform", "normal"]),
)
def test_a_token_draws_the_same_in_any_company(
    order: list[int], cuts: list[int], columns: int | None, kind: str
) -> None:
    """Shuffled over ranks of any size, every token keeps its numbers."""
    draw = getattr(keyed, kind)
    whole = draw(draws(24), 3, "drop", columns)
    edges = [0, *sorted(cuts), 24]
    for start, stop in itertools.pairwise(edges):
        mine = torch.tensor(order[start:stop], dtype=torch.int64)
        part = draw(Draws(keyed.step_key(1, 1), mine), 3, "drop", columns)
        assert torch.equal(part, whole[mine])


# ---- normals -------------------------------------------------------------------------------------


def test_normals_have_the_moments_of_the_normal_distribution() -> None:
    """Mean 0, variance 1, skewness 0, kurtosis 3, each within five standard deviations."""
    n = 100_000
    z = keyed.normal(draws(n // 10), 0, "noise", 10)
    assert z.dtype == torch.float32
    assert z.shape == (n // 10, 10)
    z = z.flatten().double()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(z.pow(power).mean() - moment) < 5 * math.sqrt(variance / n), power


@pytest.mark.parametrize(
    ("quantile", "share"),
    [(-3.0, 0.001350), (-1.959964, 0.025), (-1.0, 0.158655), (0.0, 0.5), (1.644854, 0.95)],
)
def test_normals_have_the_quantiles_of_the_normal_distribution(
    quantile: float, share: float
) -> None:
    n = 100_000
    z = keyed.normal(draws(n, seed=5), 1, "noise").double()
    deviation = math.sqrt(share * (1 - share) / n)
    assert abs((z <= quantile).double().mean() - share) < 5 * deviation


def test_normals_are_finite_and_reach_the_tails() -> None:
    z = keyed.normal(draws(1_000_000, seed=9), 0, "noise")
    assert z.isfinite().all()
    assert 4.2 < z.max() < 6.5
    assert -6.5 < z.min() < -4.2


def test_normals_are_pure_and_differ_by_every_part_of_the_key() -> None:
    n = 20_000
    reference = keyed.normal(draws(n), 0, "noise")
    before = torch.random.get_rng_state()
    assert torch.equal(keyed.normal(draws(n), 0, "noise"), reference)
    assert torch.equal(torch.random.get_rng_state(), before)
    streams = {
        "reference": reference,
        "seed": keyed.normal(draws(n, seed=2), 0, "noise"),
        "step": keyed.normal(draws(n, step=2), 0, "noise"),
        "layer": keyed.normal(draws(n), 1, "noise"),
        "purpose": keyed.normal(draws(n), 0, "drop"),
        "token": keyed.normal(draws(n, first=1), 0, "noise"),
        "column 0": keyed.normal(draws(n), 0, "noise", 2)[:, 0],
        "column 1": keyed.normal(draws(n), 0, "noise", 2)[:, 1],
    }
    correlation = torch.corrcoef(torch.stack(list(streams.values())).double())
    apart = correlation - torch.eye(len(streams), dtype=torch.float64)
    assert apart.abs().max() < 5 / math.sqrt(n), streams.keys()
