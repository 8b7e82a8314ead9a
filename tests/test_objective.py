"""Sums over global counts, by hand, however a batch is cut over ranks and micro-batches."""

from __future__ import annotations

import pytest
import torch
from strategies import close

from moetrain.data import Batch
from moetrain.loss import IGNORED
from moetrain.mesh import Mesh
from moetrain.model import Output
from moetrain.moe import Ledger
from moetrain.moe.layer import LayerStats
from moetrain.objective import Counts, Sums, count, count_all, objective, reduce, sums
from moetrain.testing import simulate_ranks


def counts(targets: int, tokens: int, groups: int) -> Counts:
    return Counts(*map(torch.tensor, (targets, tokens, groups)))


def ledger(first: int) -> Ledger:
    """Two experts, one choice; distinct numbers from `first` on."""
    outcome_EKO = torch.arange(first, first + 8).view(2, 1, 4)
    return Ledger(outcome_EKO, *(torch.tensor(first + n) for n in (8, 9, 10)))


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def part(loss: float, balance: list[float], z: list[float], first: int = 0) -> Sums:
    ledgers = tuple(ledger(first + 100 * layer) for layer in range(len(balance)))
    return Sums(numbers(loss)[0], numbers(*balance), numbers(*z), ledgers)


def batch(valid: list[list[int]], targets: list[list[int]]) -> Batch:
    """Valid flags and targets, of which -1 stands for none."""
    valid_BL, targets_BL = torch.tensor(valid).bool(), torch.tensor(targets)
    tokens_BL = torch.zeros_like(targets_BL)
    return Batch(
        tokens_BL, targets_BL.masked_fill(targets_BL < 0, IGNORED), valid_BL, tokens_BL, None
    )


def test_objective_by_hand():
    # 30/10 + 0.5·mean(4, 8)/3 + 0.1·mean(20, 60)/8
    share = objective(part(30, [4, 8], [20, 60]), counts(10, 8, 3), 0.5, 0.1)
    close(share, 3 + 1 + 0.5)


def test_the_shares_of_all_parts_add_up_to_the_objective_of_the_whole():
    cut = [part(1, [2, 3], [4, 5]), part(6, [7, 8], [9, 10])]
    whole, total = part(7, [9, 11], [13, 15]), counts(5, 6, 4)
    together = sum(objective(p, total, 0.3, 0.7) for p in cut)
    close(together, objective(whole, total, 0.3, 0.7))


def test_gradients_of_the_objective_by_hand():
    one = part(30, [4, 8], [20, 60])
    objective(one, counts(10, 8, 3), 0.5, 0.1).backward()
    for tensor, grad in ((one.balance_N, 0.5 / 2 / 3), (one.z_N, 0.1 / 2 / 8)):
        close(tensor.grad, torch.tensor([grad, grad], dtype=torch.float64))


def test_a_dense_model_has_the_cross_entropy_alone():
    close(objective(part(30, [], []), counts(10, 8, 3), 0.5, 0.1), 3.0)


def test_nothing_to_learn_from_is_zero_and_not_nan():
    one = part(0, [0, 0], [0, 0])
    share = objective(one, counts(0, 0, 0), 0.5, 0.1)
    share.backward()
    assert share == 0
    assert one.balance_N.grad is not None
    assert one.balance_N.grad.isfinite().all()


def test_sums_of_a_forward_pass():
    layers = tuple(
        LayerStats(numbers(2.0 + n)[0], numbers(5.0 + n)[0], ledger(n)) for n in range(2)
    )
    collected = sums(Output(numbers(7.0)[0], None, layers))
    assert collected.loss == 7
    assert collected.balance_N.tolist() == [2, 3]
    assert collected.z_N.tolist() == [5, 6]
    assert collected.ledgers == (layers[0].ledger, layers[1].ledger)
    assert collected.balance_N.requires_grad
    assert not any(t.requires_grad for t in collected.detach()[:3])
    dense = sums(Output(numbers(7.0)[0], None, ()))
    assert dense.balance_N.shape == dense.z_N.shape == (0,)


MINE = [
    batch([[1, 1, 1, 1], [1, 1, 0, 0]], [[5, 6, 7, 8], [9, -1, -1, -1]]),
    batch([[1, 0, 0, 0], [0, 0, 0, 0]], [[1, -1, -1, -1], [-1, -1, -1, -1]]),
]


@pytest.mark.parametrize(
    ("group_size", "groups"),
    [(4, 3), (2, 4), (1, 7), (None, 2)],  # of one rank; None: each whole micro-batch
)
@pytest.mark.parametrize("world", [1, 3])
def test_counts_by_hand(group_size, groups, world):
    def of_rank() -> list[int]:
        # Rank 2 has nothing but padding, and the others twice as much each as the one before.
        rank = torch.distributed.get_rank()
        padding = batch([[0] * 4], [[-1] * 4])
        mine = [padding] if rank == 2 else MINE * (rank + 1)
        return [
            int(n)
            for n in count_all(
                [count(batch, group_size) for batch in mine], Mesh(torch.device("cpu"))
            )
        ]

    times = 1 if world == 1 else 1 + 2
    expected = [6 * times, 7 * times, groups * times]
    assert simulate_ranks(world, of_rank) == [expected] * world


def reduced(world: int):
    """Parts with other numbers on every rank, two micro-batches each."""

    def of_rank():
        rank = torch.distributed.get_rank()
        parts = [
            part(1.5 + rank, [2, 4], [10, 20], first=1000 * rank),
            part(2.5 + rank, [6, 8], [30, 40], first=50),
        ]
        return reduce(parts, counts(16, 10, 5), Mesh(torch.device("cpu")))

    return simulate_ranks(world, of_rank)


@pytest.mark.parametrize("world", [1, 4])
def test_means_by_hand(world):
    results = reduced(world)
    ranks = range(world)
    for means in results:
        assert means.loss == pytest.approx(sum(4 + 2 * rank for rank in ranks) / 16)
        assert means.balance_loss == pytest.approx(world * (8 + 12) / 2 / 5)
        assert means.z_loss == pytest.approx(world * (40 + 60) / 2 / 10)
        for layer, total in enumerate(means.ledgers):
            firsts = [f + 100 * layer for rank in ranks for f in (1000 * rank, 50)]
            expected = [sum(entries) for entries in zip(*map(ledger, firsts), strict=True)]
            for ours, theirs in zip(total, expected, strict=True):
                assert torch.equal(ours, theirs)
                assert ours.dtype == torch.int64


def test_counts_beyond_what_floats_hold_stay_exact():
    odd = 2**60 + 1

    def of_rank():
        one = part(0, [1], [1])
        huge = one.ledgers[0]._replace(tokens=torch.tensor(odd))
        mesh = Mesh(torch.device("cpu"))
        return reduce([one._replace(ledgers=(huge,))], counts(1, 1, 1), mesh).ledgers[0].tokens

    assert simulate_ranks(2, of_rank) == [2 * odd, 2 * odd]


def test_sums_of_fp32_losses_are_not_rounded_to_fp32():
    def of_rank() -> float:
        parts = [part(loss, [], []) for loss in (2.0**24, 1.0)]
        rounded = [p._replace(loss=p.loss.float()) for p in parts]
        return reduce(rounded, counts(1, 1, 1), Mesh(torch.device("cpu"))).loss

    assert simulate_ranks(1, of_rank) == [2**24 + 1]


def test_means_of_nothing_are_zero():
    def of_rank():
        return reduce([part(0, [], [])], counts(0, 0, 0), Mesh(torch.device("cpu")))

    (means,) = simulate_ranks(1, of_rank)
    assert means == (0, 0, 0, ())
