"""The router module: its parameters, what it draws and looks up, and the bias of sigmoid."""

from __future__ import annotations

from typing import Any

import oracle_gates
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import LAYER, ROUTERS, build, draws_for, random_x
from strategies import DIM, GATES, close, gate_of
from torch import Tensor

from moetrain.moe import Draws, Gate, Router, Routing, keyed
from moetrain.moe.router import Inputs

EXPERTS = 4


def router_of(kind: str, layer: int = LAYER, **options: Any) -> Router:
    gate = Gate(**{**vars(gate_of(ROUTERS[kind])), **options})
    router = Router(layer, gate, DIM, EXPERTS).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in router.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return router


def inputs(tokens: int, **changes: Any) -> Inputs:
    number_T, valid_T = torch.arange(tokens), torch.ones(tokens, dtype=torch.bool)
    x_TD = random_x(1, tokens)[0]
    given = Inputs(x_TD, valid_T, number_T, number_T % 3, None, tokens, slots=max(1, tokens // 2))
    return given._replace(**changes)


def part(whole: Inputs, index: Tensor) -> Inputs:
    """Some of the tokens."""
    draws = whole.draws and Draws(whole.draws.step_key, whole.draws.token_id_T[index])
    per_token = ("x_TD", "valid_T", "position_T", "token_T")
    chosen = {name: getattr(whole, name)[index] for name in per_token}
    return whole._replace(**chosen, draws=draws, group_size=len(index))


# ---- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GATES)
def test_each_gate_has_its_own_weights(kind: str) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in router_of(kind).named_parameters()}
    expected = {"weight": (EXPERTS, DIM)}
    if kind in ("hash", "random", "balanced"):
        expected = {}
    if kind == "noisy_topk":
        expected["noise_weight"] = (EXPERTS, DIM)
    if kind == "hierarchical":
        expected["group_weight"] = (2, DIM)
    assert shapes == expected
    buffers = dict(router_of(kind).named_buffers())
    assert list(buffers) == (["bias"] if kind == "sigmoid" else [])


def test_the_bias_starts_at_zero_in_fp32_and_is_saved() -> None:
    router = Router(0, gate_of(ROUTERS["sigmoid"]), DIM, EXPERTS)
    assert router.bias.dtype == torch.float32
    assert router.bias.tolist() == [0.0] * EXPERTS
    assert not router.bias.requires_grad
    assert "bias" in router.state_dict()


# ---- the bias moves towards even load ------------------------------------------------------------


def test_the_bias_rises_where_load_is_below_the_mean() -> None:
    """Loads 4 0 2 2, mean 2: down, up, and unmoved twice. A second step adds to the first."""
    router = Router(0, gate_of(ROUTERS["sigmoid"]), DIM, EXPERTS)
    router.rebalance(torch.tensor([4, 0, 2, 2]), rate=0.25)
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    router.rebalance(torch.tensor([0, 8, 0, 0]), rate=0.25)
    assert router.bias.tolist() == [0.0, 0.0, 0.25, 0.25]


def test_the_sign_is_exact_for_counts_that_floats_cannot_hold() -> None:
    """One above and one below a mean of 2^53 per expert: fp32 and fp64 would see no difference."""
    load_E = torch.full((EXPERTS,), 2**53)
    load_E[0] += 1
    load_E[1] -= 1
    router = Router(0, gate_of(ROUTERS["sigmoid"]), DIM, EXPERTS)
    router.rebalance(load_E, rate=0.5)
    assert router.bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(load=st.lists(st.integers(0, 10**12), min_size=EXPERTS, max_size=EXPERTS))
def test_the_step_is_the_sign_of_the_distance_from_the_mean(load: list[int]) -> None:
    router = Router(0, gate_of(ROUTERS["sigmoid"]), DIM, EXPERTS)
    router.rebalance(torch.tensor(load), rate=1.0)
    distance = [sum(load) - one * EXPERTS for one in load]
    assert router.bias.tolist() == [float((d > 0) - (d < 0)) for d in distance]


def test_the_bias_evens_out_a_skewed_router() -> None:
    """256 tokens, one expert with a third more than its share; counted before drops, its load
    falls as its bias does. (With C slots each, the load after drops would never show it.)"""
    layer = build(oracle_gates.Router("sigmoid", 1), EXPERTS, capacity_factor=1.0)
    x_BLD, valid_BL = random_x(4, 64), torch.ones(4, 64, dtype=torch.bool)
    with torch.no_grad():
        layer.router.weight[0] += 2 * x_BLD.mean((0, 1)).sign()
    violations = []
    for _ in range(40):
        _, stats, *_ = layer(x_BLD, valid_BL, "train")
        load_E = stats.demand.count_GE[0]
        violations.append(load_E.max().item() * EXPERTS / 256 - 1)
        layer.router.rebalance(load_E, rate=0.01)
    assert violations[0] > 0.3
    assert max(violations[-10:]) < 0.1


# ---- what is drawn belongs to the token ----------------------------------------------------------


def same_routing(one: Routing, other: Routing, index: Tensor) -> None:
    for ours, theirs in zip(one, other, strict=True):
        if theirs is not None:
            assert ours is not None
            torch.testing.assert_close(ours[index], theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in GATES if kind != "expert_choice"])
def test_tokens_route_the_same_in_any_order_and_company(kind: str, training: bool) -> None:
    """Shuffled, and dealt to ranks of 1, 5 and 18 tokens."""
    router = router_of(kind, **({"jitter": 0.2} if kind == "switch" else {}))
    whole = inputs(24, draws=draws_for(24) if training else None)
    record = router(whole)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    for index in order.split([1, 5, 18]):
        same_routing(record, router(part(whole, index)), index)


@pytest.mark.parametrize("kind", ["gshard", "noisy_topk", "random", "switch"])
def test_draws_differ_by_step_layer_and_token(kind: str) -> None:
    """The same vector in 2,000 tokens: what differs was drawn."""
    options = {"jitter": 0.5} if kind == "switch" else {}
    one, other = (router_of(kind, layer, **options) for layer in (1, 2))
    x_TD = random_x(1, 1)[0].expand(2000, DIM)

    def drawn(router: Router, step: int, first: int = 0) -> Tensor:
        ids = Draws(keyed.step_key(0, step), torch.arange(first, first + 2000))
        record = router(inputs(2000, x_TD=x_TD, draws=ids))
        return torch.cat([record.logits_TE, record.sampled_TK, record.score_TE], 1).double()

    reference = drawn(one, 1)
    assert len(reference.unique(dim=0)) > 1, "tokens differ"
    assert torch.equal(drawn(one, 1), reference)
    for changed in (drawn(one, 2), drawn(other, 1), drawn(one, 1, first=2000)):
        assert not torch.equal(changed, reference)


# ---- gates without weights -----------------------------------------------------------------------


def test_hash_looks_at_the_vocabulary_id_alone() -> None:
    """The same experts for an id at any place, step and in training or not; others in another
    layer; ids spread over all experts."""
    ids_T = torch.tensor([5, 9, 5, 5, 9])
    first, second = (router_of("hash", layer) for layer in (0, 1))
    experts_TK = first(inputs(5, token_T=ids_T)).expert_TK
    trained_TK = first(inputs(5, token_T=ids_T, draws=draws_for(5))).expert_TK
    assert torch.equal(experts_TK, trained_TK)
    assert torch.equal(experts_TK[[0, 1]], experts_TK[[3, 4]])
    many = inputs(4000, token_T=torch.arange(4000))
    counts_E = first(many).expert_TK[:, 0].bincount(minlength=EXPERTS)
    assert (counts_E - 1000).abs().max() < 150
    assert not torch.equal(first(many).expert_TK, second(many).expert_TK)


def test_random_is_drawn_in_training_and_fixed_outside() -> None:
    """In evaluation by id and position: generating a text token by token routes as reading it."""
    router = router_of("random")
    fixed = router(inputs(200)).expert_TK
    assert torch.equal(router(inputs(200)).expert_TK, fixed)
    later = inputs(200, position_T=torch.arange(200) + 1)
    assert not torch.equal(router(later).expert_TK, fixed)
    other = inputs(200, token_T=torch.arange(200))
    assert not torch.equal(router(other).expert_TK, fixed)
    trained = [router(inputs(200, draws=draws_for(200, s))).expert_TK for s in (1, 1, 2)]
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


def test_random_is_uniform_over_pairs_of_experts() -> None:
    """All 12 ordered pairs of 4 experts, each within five standard deviations."""
    n = 12_000
    expert_TK = router_of("random")(inputs(n, draws=draws_for(n))).expert_TK
    pair_T = expert_TK[:, 0] * EXPERTS + expert_TK[:, 1]
    counts = pair_T.bincount(minlength=16)
    assert (counts == 0).sum() == 4
    assert (counts[counts > 0] - n / 12).abs().max() < 5 * (n / 12 * 11 / 12) ** 0.5


@pytest.mark.parametrize("mode", ["eval", "generate"])
@pytest.mark.parametrize("kind", ["hash", "random", "balanced"])
def test_a_text_continued_is_a_text_read_at_once(kind: str, mode: str) -> None:
    layer = build(ROUTERS[kind], EXPERTS)
    x_BLD, token_BL = random_x(2, 7), torch.arange(14).view(2, 7) % 4
    valid_BL = torch.ones(2, 7, dtype=torch.bool)
    whole, *_ = layer(x_BLD, valid_BL, mode, None, token_BL)
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        cut = slice(start, stop)
        y, *_ = layer(x_BLD[:, cut], valid_BL[:, cut], mode, None, token_BL[:, cut], start)
        close(y, whole[:, cut])


# ---- what is missing is named --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hash", "random"])
def test_ids_that_are_missing_are_named(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"{kind} gate needs the tokens' vocabulary ids"):
        router_of(kind)(inputs(4, token_T=None))


def test_experts_cannot_choose_without_a_capacity() -> None:
    with pytest.raises(ValueError, match="expert_choice needs a capacity"):
        router_of("expert_choice")(inputs(4, slots=None))
