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
    @settings(MANY, max_examples=20)
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


# ---- noisy top-k ---------------------------------------------------------------------------------


def test_noise_is_scaled_before_the_choice_and_seen_by_the_gate() -> None:
    """softplus(0) = log 2, so H = (1 + 2·log 2, 2, 0): expert 0 overtakes expert 1, and K = 2 gates
    are a softmax over these two alone."""
    clean_TE = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    normal_TE = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
    raw_TE = torch.zeros_like(clean_TE)
    record = routing.noisy_topk(clean_TE, raw_TE, every(1), 2, normal_TE)
    assert record.expert_TK.tolist() == [[0, 1]]
    odds = math.exp(2 * math.log(2) - 1)
    expected = torch.tensor([[odds / (1 + odds), 1 / (1 + odds)]], dtype=torch.float64)
    close(record.gate_TK, expected)
    assert routing.noisy_topk(clean_TE, raw_TE, every(1), 2, None).expert_TK.tolist() == [[1, 0]]


def test_load_compares_logits_with_the_threshold_of_the_others() -> None:
    """Logits (3, 2, 0), K = 1, deviation log 2, no noise drawn: expert 0 has to beat 2, the others
    have to beat 3. (Comparing a probability with logits would give numbers near 1/2.)"""
    clean_TE = torch.tensor([[3.0, 2.0, 0.0]], dtype=torch.float64)
    record = routing.noisy_topk(clean_TE, torch.zeros_like(clean_TE), every(1), 1, None)
    assert record.load_TE is not None
    phi = [0.5 * math.erfc(-z / math.log(2) / math.sqrt(2)) for z in (1, -1, -3)]
    close(record.load_TE, torch.tensor([phi], dtype=torch.float64))


@pytest.mark.parametrize("raw", [-200.0, -90.0, -60.0, -45.0, -20.0])
def test_noise_that_has_all_but_vanished_leaves_gradients_finite(raw: float) -> None:
    """Squared, the deviation is below what fp32 can hold: 0·∞ would be NaN."""
    clean_TE = torch.tensor([[0.0, 1.0, 20.0]], requires_grad=True)
    raw_TE = torch.full((1, 3), raw, requires_grad=True)
    record = routing.noisy_topk(clean_TE, raw_TE, every(1), 1, None)
    assert record.load_TE is not None
    assert record.load_TE.tolist() == [[0, 0, 1]]
    for gradient in torch.autograd.grad(record.load_TE.square().sum(), (clean_TE, raw_TE)):
        assert gradient.isfinite().all()


# ---- sigmoid: bias and node limit ----------------------------------------------------------------


def logits_of(*rows: list[float]) -> Tensor:
    """Logits whose sigmoid is the rows given."""
    return torch.logit(torch.tensor(rows, dtype=torch.float64))


def test_the_bias_takes_part_in_the_choice_and_not_in_the_weight() -> None:
    """Scores .8 .6 .4; a bias of .3 lifts expert 2 above expert 1. It weighs .4/(.8 + .4) all the
    same, times the scale of 3."""
    bias_E = torch.tensor([0.0, 0.0, 0.3], dtype=torch.float64)
    record = routing.sigmoid(logits_of([0.8, 0.6, 0.4]), bias_E, every(1), k=2, scale=3.0)
    assert record.expert_TK.tolist() == [[0, 2]]
    close(record.gate_TK, torch.tensor([[2.0, 1.0]], dtype=torch.float64))
    close(record.prob_TE, torch.tensor([[8 / 18, 6 / 18, 4 / 18]], dtype=torch.float64))


def test_the_node_limit_closes_the_group_with_the_single_best_expert() -> None:
    """Three nodes of two experts, two of them open, K = 4, so a node counts by its best two scores:
    .9 + .1, .5 + .6, .7 + .4. The first loses with 1.0 against 1.1 and 1.1, and with it expert 0,
    the best of all."""
    logits_TE = logits_of([0.9, 0.1, 0.5, 0.6, 0.7, 0.4])
    zero_E = torch.zeros(6, dtype=torch.float64)
    record = routing.sigmoid(logits_TE, zero_E, every(1), k=4, num_groups=3, top_groups=2)
    assert record.expert_TK.tolist() == [[4, 3, 2, 5]]
    assert (record.score_TE[0, :2] == -torch.inf).all()
    free = routing.sigmoid(logits_TE, zero_E, every(1), k=4)
    assert free.expert_TK.tolist() == [[0, 4, 3, 2]]


def test_of_equal_nodes_the_first_are_open() -> None:
    zero_E = torch.zeros(6, dtype=torch.float64)
    record = routing.sigmoid(
        torch.zeros(1, 6, dtype=torch.float64), zero_E, every(1), 2, num_groups=3, top_groups=2
    )
    assert record.expert_TK.tolist() == [[0, 1]]
    assert record.score_TE.isfinite().tolist() == [[True] * 4 + [False] * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_logits_have_equal_scores_wherever_they_stand(dtype: torch.dtype) -> None:
    """Elementwise kernels round the odd elements at the end of their range by another routine:
    a tie must not depend on how many tokens a rank holds."""
    generator = torch.Generator().manual_seed(0)
    for tokens in range(1, 120):
        logits_TE = 3 * torch.randn(tokens, 1, generator=generator, dtype=dtype).expand(tokens, 7)
        record = routing.sigmoid(logits_TE.contiguous(), torch.zeros(7), every(tokens), 2)
        assert (record.expert_TK == torch.tensor([0, 1])).all(), tokens


def test_sigmoid_scores_that_underflow_still_add_up_to_one() -> None:
    logits_TE = torch.full((1, 4), -500.0)
    record = routing.sigmoid(logits_TE, torch.zeros(4), every(1), 2)
    assert record.gate_TK.tolist() == [[0.5, 0.5]]
    close(record.prob_TE.double(), torch.full((1, 4), 0.25, dtype=torch.float64))


# ---- two levels ----------------------------------------------------------------------------------


def test_two_levels_weigh_by_the_product() -> None:
    """Groups (.6, .3, .1), two open; inside them (.9, .1) and (.4, .6): experts 0 and 3, weighing
    .6·.9 and .3·.6, or with each level divided by what it chose 2/3 and 1/3."""
    outer_TA = logs([0.6, 0.3, 0.1])
    inner_TE = logs([0.9, 0.1, 0.4, 0.6, 0.5, 0.5])
    raw = routing.hierarchical(outer_TA, inner_TE, every(1), 2, 2, renormalize=False)
    shared = routing.hierarchical(outer_TA, inner_TE, every(1), 2, 2, renormalize=True)
    assert raw.expert_TK.tolist() == shared.expert_TK.tolist() == [[0, 3]]
    close(raw.gate_TK, torch.tensor([[0.54, 0.18]], dtype=torch.float64))
    close(shared.gate_TK, torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64))
    probs = [[0.54, 0.06, 0.12, 0.18, 0.05, 0.05]]
    close(raw.prob_TE, torch.tensor(probs, dtype=torch.float64))


def test_two_levels_order_choices_by_weight_not_by_group() -> None:
    """The better group spreads (.5, .5), the other has (.01, .99): expert 3 comes first. Experts 0
    and 1 tie, so 0 comes before 1."""
    outer_TA, inner_TE = logs([0.55, 0.45]), logs([0.5, 0.5, 0.01, 0.99])
    record = routing.hierarchical(outer_TA, inner_TE, every(1), 4, 2, renormalize=False)
    assert record.expert_TK.tolist() == [[3, 0, 1, 2]]


def test_two_levels_of_ties_go_to_the_first_groups_and_experts() -> None:
    zeros = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 9, dtype=torch.float64)
    record = routing.hierarchical(*zeros, every(1), 4, 2, renormalize=True)
    assert record.expert_TK.tolist() == [[0, 1, 3, 4]]


def test_two_levels_of_equal_weight_go_by_expert_not_by_group() -> None:
    """Group 1 is the better one, so it is looked at first; but its expert 3 and both experts of
    group 0 weigh 0 alike (their probabilities underflow), and so stand in the order of experts."""
    outer_TA = torch.tensor([[-2000.0, 0.0]])
    inner_TE = torch.tensor([[0.0, 0.0, 0.0, -2000.0]])
    record = routing.hierarchical(outer_TA, inner_TE, every(1), 4, 2, renormalize=False)
    assert record.gate_TK.tolist() == [[1, 0, 0, 0]]
    assert record.expert_TK.tolist() == [[2, 0, 1, 3]]


# ---- experts that choose, and gates without a router ---------------------------------------------


def test_experts_take_the_tokens_that_want_them_most() -> None:
    """Two experts of one slot, tokens (.9 .1), (.8 .2), (.3 .7), (.9 .1): expert 0 ties between
    tokens 0 and 3 and takes the first; expert 1 takes token 2. Nobody takes tokens 1 and 3."""
    logits_TE = logs([0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.9, 0.1])
    record = routing.expert_choice(logits_TE, every(4), group_size=4, slots=1)
    assert record.expert_TK.tolist() == [[0, 2], [2, 2], [1, 2], [2, 2]]
    close(record.gate_TK[:, 0], torch.tensor([0.9, 0.0, 0.7, 0.0], dtype=torch.float64))
    assert (record.gate_TK[:, 1] == 0).all()


def test_a_token_may_be_taken_by_every_expert_or_none_of_its_group() -> None:
    """Group 1 is token 0 and padding: both experts take it, and each leaves its second slot empty.
    In group 2 each expert takes both tokens."""
    logits_TE = logs([0.4, 0.6], [0.5, 0.5], [0.9, 0.1], [0.2, 0.8])
    valid_T = torch.tensor([True, False, True, True])
    record = routing.expert_choice(logits_TE, valid_T, group_size=2, slots=2)
    assert record.expert_TK.tolist() == [[1, 0], [2, 2], [0, 1], [1, 0]]


def test_experts_choose_by_looking_ahead() -> None:
    """A later token that wants the expert more takes it from an earlier one: why a causal model
    refuses this gate."""
    alone = routing.expert_choice(logs([0.7, 0.3], [0.5, 0.5]), every(2), 2, 1)
    beside = routing.expert_choice(logs([0.7, 0.3], [0.8, 0.2]), every(2), 2, 1)
    assert alone.expert_TK[0].tolist() == [0, 2]
    assert beside.expert_TK[0].tolist() == [1, 2]


def test_round_robin_gives_every_expert_its_turn() -> None:
    """Three experts, K = 2: positions 0 to 3 ask for 0 1, 2 0, 1 2, 0 1."""
    score_TE = routing.round_robin(torch.arange(4), 3, 2).double()
    record = routing.ranked(score_TE, every(4), 2)
    assert record.expert_TK.tolist() == [[0, 1], [2, 0], [1, 2], [0, 1]]
    assert (record.gate_TK == 0.5).all()
    close(record.logits_TE.logsumexp(1), torch.zeros(4, dtype=torch.float64))


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"top-k \(5\) must not exceed .* \(4\)"):
        routing.choose(torch.zeros(2, 4), 5)


# ---- tokens that repeat --------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-15), (torch.float32, 1e-6)])
def test_tokens_that_are_equal_but_for_rounding_tie(dtype: torch.dtype, rounding: float) -> None:
    """Eight tokens alike, each off by some rounding, as another layout would have it: the experts
    that choose take the first two, and so does a rank by weight."""
    generator = torch.Generator().manual_seed(0)
    noise_TE = rounding * torch.randn(8, 4, generator=generator, dtype=dtype)
    logits_TE = torch.tensor([[0.3, -0.2, 0.9, 0.1]], dtype=dtype) + noise_TE
    record = routing.expert_choice(logits_TE, every(8), group_size=8, slots=2)
    assert (record.expert_TK < 4).all(1).tolist() == [True] * 2 + [False] * 6
    gate_TK = routing.switch(logits_TE, every(8)).gate_TK
    assert len(set(gate_TK.flatten().tolist())) > 1
    assert len(set(routing.comparable(gate_TK).flatten().tolist())) == 1
