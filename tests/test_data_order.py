import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.order import permute, shuffled


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_every_sample_comes_exactly_once_in_an_epoch(n, seed, epoch):
    place = permute(np.arange(n), n, seed, epoch)
    np.testing.assert_array_equal(np.sort(place), np.arange(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2**31, 2**61), seed=st.integers(0, 100))
def test_a_corpus_too_large_for_a_table_keeps_its_indices_apart_and_inside(n, seed):
    index = np.unique(np.linspace(0, n - 1, 200).astype(np.int64).clip(0, n - 1))
    place = permute(index, n, seed, 0)
    assert len(np.unique(place)) == len(index)
    assert place.min() >= 0
    assert place.max() < n


def test_the_order_is_the_same_on_every_machine_and_version():
    # written down once: a change here would reorder every run that is resumed
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == [5, 0, 9, 8, 3, 2, 1, 7, 6, 4]
    assert permute(np.arange(4), 10**12, seed=7, epoch=3).tolist() == [
        791601853505,
        753441506602,
        913322027520,
        782843752409,
    ]


def test_one_index_alone_maps_as_it_does_among_others():
    together = permute(np.arange(1000), 1000, seed=3, epoch=2)
    alone = [int(permute(np.array([i]), 1000, seed=3, epoch=2)[0]) for i in range(0, 1000, 37)]
    assert alone == together[::37].tolist()


def test_seeds_and_epochs_give_other_orders():
    orders = {
        tuple(permute(np.arange(100), 100, seed, epoch)) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


@pytest.mark.parametrize("n", [100, 1000, 4097])
def test_neighbours_do_not_stay_neighbours(n):
    place = permute(np.arange(n), n, seed=1, epoch=0)
    assert abs(np.corrcoef(place, np.arange(n))[0, 1]) < 4 / np.sqrt(n)
    assert (np.abs(np.diff(place)) == 1).mean() < 10 / n


def test_the_first_sample_is_uniform_over_seeds():
    n, num_seeds = 10, 3000
    first = [int(permute(np.array([0]), n, seed, 0)[0]) for seed in range(num_seeds)]
    counts = np.bincount(first, minlength=n)
    chi2 = ((counts - num_seeds / n) ** 2 / (num_seeds / n)).sum()
    assert chi2 < 27.9  # 0.999 quantile with 9 degrees of freedom


def test_global_indices_count_on_over_epochs():
    n = 7
    order = shuffled(np.arange(3 * n), n, seed=5).reshape(3, n)
    for epoch, row in enumerate(order):
        np.testing.assert_array_equal(row, permute(np.arange(n), n, 5, epoch))
    straddling = shuffled(np.array([6, 7, 20, 0]), n, seed=5)
    assert straddling.tolist() == [order[0, 6], order[1, 0], order[2, 6], order[0, 0]]
