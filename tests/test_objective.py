"""Sums over global counts, by hand, however a batch is cut over ranks and micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetrain.data import Batch
from moetrain.loss import IGNORED
from moetrain.mesh import Mesh
from moetrain.model import Output
from moetrain.moe import Gate, Ledger
from moetrain.moe.balance import Demand
from moetrain.moe.layer import LayerStats
from moetrain.moe.ledger import GateMass
from moetrain.objective import (
    BatchBalance,
    Counts,
    Means,
    Sums,
    add,
    batch_balance,
    count,
    count_all,
    loads,
    objective,
    reduce,
    sums,
    tally,
)
from moetrain.testing import simulate_ranks


def close(actual: Tensor, expected: Tensor | float) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def counts(targets: int, tokens: int, groups: int) -> Counts:
    return Counts(*map(torch.tensor, (targets, tokens, groups)))


def ledger(first: int) -> Ledger:
    """Two experts, one choice; distinct numbers from `first` on."""
    numbers = torch.arange(first, first + 14).split([8, 1, 2, 1, 1, 1])
    outcome_O, assigned, row_E, tokens, lost_tokens, slots = numbers
    return Ledger(outcome_O.view(2, 1, 4), assigned[0], row_E, tokens[0], lost_tokens[0], slots[0])


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def demand(count: list[int], mass: list[float], tokens: int) -> Demand:
    """One set of tokens, with one mass per expert."""
    mass_GME = torch.tensor([[mass]], dtype=torch.float64, requires_grad=True)
    return Demand(torch.tensor([count]), mass_GME, torch.tensor([tokens]))


def part(loss: float, balance: list[float], z: list[float], first: int = 0) -> Sums:
    """Of every layer the gate weight is 10, of which 2 and then 4 more a layer are dropped."""
    layers = range(len(balance))
    return Sums(
        loss=numbers(loss)[0],
        balance_N=numbers(*balance),
        z_N=numbers(*z),
        demands=tuple(demand([1, 1], [1.0, 1.0], 2) for _ in layers),
        gate_mass_N2=torch.tensor([[10.0, 2.0 + 4 * n] for n in layers]).view(-1, 2),
        ledgers=tuple(ledger(first + 100 * layer) for layer in layers),
        would_drop=tuple(torch.tensor([first + layer, 1]) for layer in layers),
    )


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
        LayerStats(
            numbers(2.0 + n)[0],
            demand([1, n], [3.0, 4.0], 5),
            numbers(5.0 + n)[0],
            ledger(n),
            GateMass(torch.tensor(8.0), torch.tensor(float(n))),
            torch.tensor([n, 0]),
        )
        for n in range(2)
    )
    collected = sums(Output(numbers(7.0)[0], None, layers))
    assert collected.loss == 7
    assert collected.balance_N.tolist() == [2, 3]
    assert collected.z_N.tolist() == [5, 6]
    assert collected.ledgers == (layers[0].ledger, layers[1].ledger)
    assert collected.demands == (layers[0].demand, layers[1].demand)
    assert collected.gate_mass_N2.tolist() == [[8, 0], [8, 1]]
    assert collected.would_drop == (layers[0].would_drop_F, layers[1].would_drop_F)
    assert collected.balance_N.requires_grad
    free = collected.detach()
    assert not any(t.requires_grad for t in free[:3])
    assert not any(d.mass_GME.requires_grad for d in free.demands)
    assert [d.mass_GME.tolist() for d in free.demands] == [[[[3, 4]]]] * 2
    dense = sums(Output(numbers(7.0)[0], None, ()))
    assert dense.balance_N.shape == dense.z_N.shape == (0,)
    assert dense.gate_mass_N2.shape == (0, 2)
    assert dense.demands == dense.ledgers == dense.would_drop == ()


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


def apart(parts: list[Sums]) -> list[Sums]:
    return parts


def added(parts: list[Sums]) -> list[Sums]:
    return [add(*parts)]


CUTS = pytest.mark.parametrize("cut", [apart, added])


def reduced(world: int, cut):
    """Parts with other numbers on every rank, two micro-batches each."""

    def of_rank():
        rank = torch.distributed.get_rank()
        parts = [
            part(1.5 + rank, [2, 4], [10, 20], first=1000 * rank),
            part(2.5 + rank, [6, 8], [30, 40], first=50),
        ]
        return reduce(cut(parts), counts(16, 10, 5), Mesh(torch.device("cpu")))

    return simulate_ranks(world, of_rank)


@CUTS
@pytest.mark.parametrize("world", [1, 4])
def test_means_by_hand(world, cut):
    results = reduced(world, cut)
    ranks = range(world)
    for means in results:
        assert means.loss == pytest.approx(sum(4 + 2 * rank for rank in ranks) / 16)
        assert means.targets == 16
        assert means.balance_loss == pytest.approx(world * (8 + 12) / 2 / 5)
        assert means.z_loss == pytest.approx(world * (40 + 60) / 2 / 10)
        for layer, total in enumerate(means.ledgers):
            firsts = [f + 100 * layer for rank in ranks for f in (1000 * rank, 50)]
            expected = [sum(entries) for entries in zip(*map(ledger, firsts), strict=True)]
            for ours, theirs in zip(total, expected, strict=True):
                assert torch.equal(ours, theirs)
                assert ours.dtype == torch.int64
        assert [layer.dropped_gate_mass for layer in means.layers] == pytest.approx([0.2, 0.6])
        for number, layer in enumerate(means.layers):
            for rank, outcome in enumerate(layer.outcomes_by_rank):
                books = [ledger(f + 100 * number) for f in (1000 * rank, 50)]
                expected = sum(book.outcome_EKO.sum((0, 1)) for book in books)
                assert list(outcome) == expected.tolist()


def test_counts_beyond_what_floats_hold_stay_exact():
    odd = 2**60 + 1

    def of_rank():
        one = part(0, [1], [1])
        huge = one.ledgers[0]._replace(tokens=torch.tensor(odd))
        mesh = Mesh(torch.device("cpu"))
        return reduce([one._replace(ledgers=(huge,))], counts(1, 1, 1), mesh).ledgers[0].tokens

    assert simulate_ranks(2, of_rank) == [2 * odd, 2 * odd]


@CUTS
def test_sums_of_fp32_losses_are_not_rounded_to_fp32(cut):
    def of_rank() -> float:
        parts = [part(loss, [], []) for loss in (2.0**24, 1.0)]
        rounded = [p._replace(loss=p.loss.float()) for p in parts]
        return reduce(cut(rounded), counts(1, 1, 1), Mesh(torch.device("cpu"))).loss

    assert simulate_ranks(1, of_rank) == [2**24 + 1]


def test_means_of_nothing_are_zero():
    def of_rank():
        return reduce([part(0, [], [])], counts(0, 0, 0), Mesh(torch.device("cpu")))

    (means,) = simulate_ranks(1, of_rank)
    assert means == (0, 0, 0, (), 0)
    assert means.ledgers == ()


def test_a_layer_without_gate_weight_dropped_none_of_it():
    def of_rank():
        one = part(0, [1], [1])._replace(gate_mass_N2=torch.zeros(1, 2))
        return reduce([one], counts(1, 1, 1), Mesh(torch.device("cpu"))).layers[0]

    assert simulate_ranks(1, of_rank)[0].dropped_gate_mass == 0


# ---------------------------------------------------------------- the batch as one set of tokens

TOPK = Gate("topk", 1)
# Of 2 experts: choices, summed probabilities and tokens of both micro-batches of both ranks. The
# shares of choices come to (6, 2)/8 and the mean probabilities to (5, 3)/8, so that the loss is
# 2·(6·5 + 2·3)/64 and its gradients by the masses are 2·6/64 and 2·2/64.
CUT = [
    [([2, 0], [1.5, 0.5], 2), ([0, 2], [0.25, 1.75], 2)],
    [([3, 0], [2.5, 0.5], 3), ([1, 0], [0.75, 0.25], 1)],
]


def shares_of_a_batch(layers: int) -> tuple[BatchBalance, list[Tensor], Means]:
    rank, mesh = torch.distributed.get_rank(), Mesh(torch.device("cpu"))
    demands = [tuple(demand(*cut) for _ in range(layers)) for cut in CUT[rank]]
    whole = batch_balance(TOPK, demands, mesh)
    parts = [part(0, [9.0] * layers, [0.0] * layers)._replace(demands=d) for d in demands]
    total = counts(1, 8, 4)
    for one in parts:
        objective(one, total, 0.5, 0.0, whole).backward()
    grads = [d.mass_GME.grad for d in (d for part in demands for d in part)]
    return whole, grads, reduce([p.detach() for p in parts], total, mesh, whole)


@pytest.mark.parametrize("layers", [1, 3])
def test_balance_of_the_whole_batch_by_hand(layers):
    """The same on every rank, whatever the loss of its own tokens."""
    gradient = torch.tensor([12 / 64, 4 / 64], dtype=torch.float64)
    for whole, _, means in simulate_ranks(2, shares_of_a_batch, layers):
        close(whole.loss_N, torch.full((layers,), 72 / 64, dtype=torch.float64))
        for of_layer in whole.gradients:
            close(of_layer.flatten(), gradient)
        assert means.balance_loss == pytest.approx(72 / 64)


@pytest.mark.parametrize("layers", [1, 3])
def test_every_part_has_the_gradient_of_the_whole(layers):
    expected = 0.5 / layers * torch.tensor([12 / 64, 4 / 64], dtype=torch.float64)
    for _, grads, _ in simulate_ranks(2, shares_of_a_batch, layers):
        assert len(grads) == 2 * layers
        for grad in grads:
            close(grad.flatten(), expected)


def test_loads_add_choices_over_ranks_and_micro_batches():
    def of_rank() -> Tensor:
        mesh = Mesh(torch.device("cpu"))
        parts = [
            part(0, [0, 0], [0, 0])._replace(demands=(demand(*cut), demand([5, 0], [1.0, 1.0], 5)))
            for cut in CUT[mesh.rank]
        ]
        return loads(parts, mesh)

    for load_NE in simulate_ranks(2, of_rank):
        assert load_NE.tolist() == [[6, 2], [20, 0]]
        assert load_NE.dtype == torch.int64


def test_loads_beyond_what_floats_hold_stay_exact():
    odd = 2**60 + 1

    def of_rank() -> list[list[int]]:
        one = part(0, [0], [0])._replace(demands=(demand([odd, 0], [1.0, 1.0], 1),))
        return loads([one], Mesh(torch.device("cpu"))).tolist()

    assert simulate_ranks(2, of_rank) == [[[2 * odd, 0]]] * 2


def test_a_tally_adds_assignments_and_drops_over_ranks_and_micro_batches():
    """Layer n of a part that begins at f has 8 + f + 100·n assignments."""

    def of_rank() -> Tensor:
        mesh = Mesh(torch.device("cpu"))
        mine = [part(0, [0, 0], [0, 0], 10 * mesh.rank + first) for first in (0, 1)]
        return tally(mine, mesh)

    for found in simulate_ranks(2, of_rank):
        assert found.tolist() == [[4 * 8 + 22, 22, 4], [4 * 108 + 22, 26, 4]]
        assert found.dtype == torch.int64
