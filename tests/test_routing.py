from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given
from strategies import KINDS, MANY, Case, asking, cases, close, gradients, route

from moetrain.moe import Draws, keyed, routing


def every(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, dtype=torch.bool)


def logs(*rows: list[float]) -> torch.Tensor:
    """Logits whose softmax is the rows given."""
    return torch.tensor(rows, dtype=torch.float64).log()


# ---- against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gates_agree_with_the_oracle(kind: str) -> None:
    @MANY
    @given(case=cases(kind))
    def agree(case: Case) -> None:
        logits_TE = case.logits()
        record, answer = case.route(logits_TE), case.answer(logits_TE)
        weight = case.numbers(case.tokens, case.router.k, stream=1)
        ours = theirs = torch.zeros((), dtype=torch.float64)
        for t, choices in enumerate(answer.choices):
            if choices is None:
                continue
            assert record.expert_TK[t].tolist() == [c.expert for c in choices]
            assert record.sampled_TK[t].tolist() == [c.sampled for c in choices]
            close(record.gate_TK[t], torch.stack([c.gate for c in choices]))
            ours = ours + (weight[t] * record.gate_TK[t]).sum()
            theirs = theirs + sum(w * c.gate for w, c in zip(weight[t], choices, strict=True))
        close(*(gradients(total, [logits_TE])[0] for total in (ours, theirs)))

    agree()


# ---- tables --------------------------------------------------------------------------------------


def test_switch_weighs_by_the_probability_itself() -> None:
    record = routing.switch(logs([0.2, 0.5, 0.3], [0.7, 0.2, 0.1]), every(2))
    assert record.expert_TK.tolist() == [[1], [0]]
    close(record.gate_TK, torch.tensor([[0.5], [0.7]], dtype=torch.float64))


def test_gshard_weighs_by_the_share_of_the_two() -> None:
    record = routing.gshard(logs([0.2, 0.5, 0.3], [0.6, 0.15, 0.25]), every(2), None)
    assert record.expert_TK.tolist() == [[1, 2], [0, 2]]
    close(record.gate_TK, torch.tensor([[5 / 8, 3 / 8], [60 / 85, 25 / 85]], dtype=torch.float64))


def test_topk_renormalises_only_where_asked() -> None:
    logits_TE = logs([0.1, 0.4, 0.2, 0.3])
    raw = routing.topk(logits_TE, every(1), k=3, renormalize=False)
    shared = routing.topk(logits_TE, every(1), k=3, renormalize=True)
    assert raw.expert_TK.tolist() == shared.expert_TK.tolist() == [[1, 3, 2]]
    close(raw.gate_TK, torch.tensor([[0.4, 0.3, 0.2]], dtype=torch.float64))
    close(shared.gate_TK, torch.tensor([[4 / 9, 3 / 9, 2 / 9]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("experts", [1, 5, 8, 64, 257])
def test_the_lowest_expert_wins_a_tie(experts: int, dtype: torch.dtype) -> None:
    """All experts are equal, so the choices are the first K; then one expert stands out."""
    logits_TE = torch.full((3, experts), 0.25, dtype=dtype)
    k = min(experts, 4)
    record = routing.topk(logits_TE, every(3), k, renormalize=True)
    assert record.expert_TK.tolist() == [list(range(k))] * 3
    logits_TE[:, experts - 1] = 1
    record = routing.topk(logits_TE, every(3), k, renormalize=True)
    assert record.expert_TK.tolist() == [[experts - 1, *range(k - 1)]] * 3


def test_probabilities_that_underflow_still_give_distinct_experts() -> None:
    """Three of four probabilities are 0: a tie, not a reason to choose one expert twice."""
    logits_TE = torch.tensor([[-2000.0, 0.0, -1000.0, -torch.inf]])
    record = routing.topk(logits_TE, every(1), k=4, renormalize=True)
    assert record.expert_TK.tolist() == [[1, 0, 2, 3]]
    assert record.gate_TK.tolist() == [[1, 0, 0, 0]]


def test_the_choice_of_a_token_does_not_depend_on_its_neighbours() -> None:
    logits_TE = torch.randint(-2, 3, (64, 6), generator=torch.Generator().manual_seed(0)).double()
    whole = routing.topk(logits_TE, every(64), 3, renormalize=True)
    for t in range(64):
        alone = routing.topk(logits_TE[t : t + 1], every(1), 3, renormalize=True)
        assert torch.equal(alone.expert_TK[0], whole.expert_TK[t])


@pytest.mark.parametrize("router", [oracle.Router("switch", 1), oracle.Router("topk", 3)])
def test_only_gshard_leaves_choices_unsampled(router: oracle.Router) -> None:
    record = route(router, torch.randn(16, 4), every(16))
    assert bool(record.sampled_TK.all())


# ---- the random second expert --------------------------------------------------------------------


def test_the_second_expert_is_kept_below_twice_its_gate() -> None:
    """g2 is 0.2 after renormalisation (0.1 before): drawn numbers below 0.4 keep the second."""
    logits_TE = logs([0.4, 0.1, 0.0]).repeat(5, 1)
    logits_TE[:, 2] = math.log(0.09)
    uniform_T = torch.tensor([0.0, 0.19, 0.21, 0.39, 0.41])
    record = routing.gshard(logits_TE, every(5), uniform_T)
    assert record.sampled_TK[:, 0].all()
    assert record.sampled_TK[:, 1].tolist() == [True, True, True, True, False]


def test_equal_gates_always_keep_the_second() -> None:
    largest = 1 - 2.0**-24
    record = routing.gshard(torch.zeros(1, 2), every(1), torch.tensor([largest]))
    assert record.sampled_TK.tolist() == [[True, True]]


def test_sampling_changes_no_gate() -> None:
    """A token that loses its second expert keeps g1/(g1+g2), not 1 (Algorithm 1)."""
    logits_TE = logs([0.6, 0.2, 0.2])
    drawn = routing.gshard(logits_TE, every(1), torch.tensor([0.99]))
    close(drawn.gate_TK, torch.tensor([[0.75, 0.25]], dtype=torch.float64))
    assert drawn.sampled_TK.tolist() == [[True, False]]


@pytest.mark.parametrize("second", [0.02, 0.1, 0.25, 0.4, 0.5])
def test_the_second_expert_is_kept_with_probability_twice_its_gate(second: float) -> None:
    """Over 40,000 tokens; the bound is five standard deviations."""
    tokens = 40_000
    logits_TE = logs([1 - second, second]).expand(tokens, 2)
    uniform_T = keyed.uniform(draws(tokens), layer=3, purpose="second expert")
    kept = routing.gshard(logits_TE, every(tokens), uniform_T).sampled_TK[:, 1]
    chance = 2 * second
    deviation = math.sqrt(chance * (1 - chance) / tokens)
    assert abs(kept.double().mean().item() - chance) <= 5 * deviation


# ---- keyed uniforms ------------------------------------------------------------------------------


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


def test_asking_gives_the_choices_that_the_tables_mean() -> None:
    """The helper of the tables below is itself held to its word."""
    record = routing.topk(asking([(2, 0), (1, 2)], 3), every(2), 2, renormalize=True)
    assert record.expert_TK.tolist() == [[2, 0], [1, 2]]
