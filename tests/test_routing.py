from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from oracle_gates import Token, scalar
from strategies import GATES, MANY, Case, asking, cases, close, gradients
from torch import Tensor

from moetrain.moe import Draws, Routing, keyed, routing


def every(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, dtype=torch.bool)


def logs(*rows: list[float]) -> torch.Tensor:
    """Logits whose softmax is the rows given."""
    return torch.tensor(rows, dtype=torch.float64).log()


# ---- against the oracle --------------------------------------------------------------------------


def assert_choices_agree(record: Routing, tokens: list[Token | None], experts: int) -> None:
    for t, token in enumerate(tokens):
        if token is None:
            continue
        missing = record.expert_TK.shape[1] - len(token.choices)
        expected = [c.expert for c in token.choices] + [experts] * missing
        assert record.expert_TK[t].tolist() == expected
        sampled = [c.sampled for c in token.choices] + [True] * missing
        assert record.sampled_TK[t].tolist() == sampled
        order = record.score_TE[t].sort(descending=True, stable=True).indices.tolist()
        open_E = [e for e in order if record.score_TE[t, e] > -torch.inf]
        if any(score.isfinite() for score in record.score_TE[t]):
            assert open_E == token.ranking


def vectors(record: Routing, tokens: list[Token | None]) -> list[tuple[Tensor, Tensor]]:
    """Everything differentiable of valid tokens: of the code under test, of the oracle."""
    pairs = []
    for t, token in enumerate(tokens):
        if token is None:
            continue
        missing = [scalar(0.0)] * (record.gate_TK.shape[1] - len(token.choices))
        gates = [c.gate for c in token.choices] + missing
        pairs.append((record.gate_TK[t], torch.stack(gates)))
        pairs.append((record.prob_TE[t], torch.stack(token.probs)))
        pairs.append((record.logits_TE[t], torch.stack(token.logits)))
        if token.load:
            assert record.load_TE is not None
            pairs.append((record.load_TE[t], torch.stack(token.load)))
    return pairs


@pytest.mark.parametrize("kind", GATES)
def test_gates_and_their_gradients_agree_with_the_oracle(kind: str) -> None:
    @settings(MANY, max_examples=40)
    @given(case=cases(kind))
    def agree(case: Case) -> None:
        leaves = case.leaves()
        record, answer = case.route(leaves), case.answer(leaves)
        assert_choices_agree(record, answer.tokens, case.experts)
        ours = theirs = torch.zeros((), dtype=torch.float64)
        for i, (mine, judged) in enumerate(vectors(record, answer.tokens)):
            close(mine, judged)
            weight = case.normals(len(mine), stream=20 + i)
            ours, theirs = ours + (weight * mine).sum(), theirs + (weight * judged).sum()
        every = list(leaves.values())
        for mine, judged in zip(gradients(ours, every), gradients(theirs, every), strict=True):
            close(mine, judged)

    agree()


@given(case=cases())
@MANY
def test_records_keep_their_promises(case: Case) -> None:
    """Shapes, types, no gradient through scores; of padding too, whatever it says."""
    record = case.route(case.leaves())
    shape = case.tokens, case.columns
    assert record.expert_TK.shape == record.gate_TK.shape == record.sampled_TK.shape == shape
    assert (record.expert_TK.dtype, record.sampled_TK.dtype) == (torch.int64, torch.bool)
    assert record.gate_TK.dtype == record.prob_TE.dtype == torch.float64
    assert record.prob_TE.shape == record.logits_TE.shape == record.score_TE.shape
    assert not record.score_TE.requires_grad
    close(record.prob_TE.sum(1), torch.ones(case.tokens, dtype=torch.float64))
    for chosen in record.expert_TK.tolist():
        real = [e for e in chosen if e < case.experts]
        assert len(set(real)) == len(real), "no expert twice"


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


@given(case=cases())
@MANY
def test_only_gshard_leaves_choices_unsampled(case: Case) -> None:
    record = case.route(case.leaves())
    assert case.router.kind == "gshard" or bool(record.sampled_TK.all())


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
    draws = Draws(keyed.step_key(1, 1), torch.arange(tokens))
    uniform_T = keyed.uniform(draws, layer=3, purpose="second expert")
    kept = routing.gshard(logits_TE, every(tokens), uniform_T).sampled_TK[:, 1]
    chance = 2 * second
    deviation = math.sqrt(chance * (1 - chance) / tokens)
    assert abs(kept.double().mean().item() - chance) <= 5 * deviation


def test_asking_gives_the_choices_that_the_tables_mean() -> None:
    """The helper of the tables below is itself held to its word."""
    record = routing.topk(asking([(2, 0), (1, 2)], 3), every(2), 2, renormalize=True)
    assert record.expert_TK.tolist() == [[2, 0], [1, 2]]
