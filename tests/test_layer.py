from __future__ import annotations

import math
from typing import Any

import oracle
import oracle_losses
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    GSHARD,
    HIDDEN,
    LAYER,
    ROUTERS,
    SWITCH,
    TOP2,
    WAYS,
    Judged,
    asks,
    build,
    draws_for,
    experts_in,
    given_for,
    layer_of,
    random_x,
    run,
    same,
)
from oracle_gates import Router
from strategies import DIM, GATES, MANY, POLICIES, Case, cases, close, gate_of, listen
from test_ledger import assert_ledger
from torch import Tensor

from moetrain.model import Block, FeedForward, SharedGate, Tokens
from moetrain.moe import OUTCOMES, Draws, MoE, Routing, keyed
from moetrain.moe.balance import balance

# ---- against the oracle --------------------------------------------------------------------------


def check_layer(case: Case, as_sequences: bool) -> None:
    """Outputs, losses, ledger, gate mass and every gradient."""
    layer = layer_of(case, as_sequences)
    shape = (case.groups, case.group_size) if as_sequences else (1, case.tokens)
    x_BLD = case.x().view(*shape, DIM)
    draws = draws_for(case.tokens, step=case.seed + 1) if case.drawn else None
    told = given_for(layer, *shape, draws)
    ours = run(layer, x_BLD, case.valid, "train" if case.drawn else "eval", draws)
    theirs = Judged(layer, case.router, x_BLD, case.valid, case.rules(told), told)
    close(ours.y.view(-1, DIM), theirs.y)
    close(ours.stats.balance_sum, theirs.answer.balance)
    close(ours.stats.z_sum, theirs.answer.z)
    tokens = [token for token in theirs.answer.tokens if token is not None]
    close(balance(layer.gate, ours.stats.demand)[0], oracle_losses.balance(case.router, tokens))
    assert_ledger(ours.stats.ledger, theirs.answer.ledger)
    mass = [theirs.answer.ledger.gate_mass, theirs.answer.ledger.lost_mass]
    close(torch.stack(ours.stats.gate_mass), torch.tensor(mass, dtype=torch.float64))
    assert ours.grads.keys() == theirs.grads.keys()
    for name, grad in ours.grads.items():
        # without noise its weight takes no part in anything where no expert is left to win against
        if case.drawn or name != "router.noise_weight":
            assert grad is not None, name
        grad = torch.zeros_like(theirs.grads[name]) if grad is None else grad
        close(grad.view_as(theirs.grads[name]), theirs.grads[name])


@pytest.mark.parametrize("policy", [*POLICIES, "dropless"])
@pytest.mark.parametrize("kind", GATES)
def test_layer_and_all_its_gradients_agree_with_the_oracle(kind: str, policy: str) -> None:
    dropless = policy == "dropless"

    @settings(MANY, max_examples=6)
    @given(
        case=cases(kind, dropless, "position" if dropless else policy), as_sequences=st.booleans()
    )
    def agree(case: Case, as_sequences: bool) -> None:
        check_layer(case, as_sequences)

    agree()


def test_jitter_scales_what_the_router_sees_and_nothing_else() -> None:
    """x·U[1-ε, 1+ε] reaches the router; experts get x itself. Gradients flow through both."""
    jitter, x_BLD, draws = 0.3, random_x(2, 6), draws_for(12)
    layer = build(SWITCH, 4, jitter=jitter, capacity_factor=1.0)
    scale_TD = (1 + jitter * (2 * keyed.uniform(draws, LAYER, "jitter", DIM) - 1)).double()
    assert scale_TD.min() >= 1 - jitter
    assert scale_TD.max() <= 1 + jitter
    rules = oracle.Rules(6, oracle.capacity(6, 4, 1, 1.0, 1))
    told = given_for(layer, 2, 6, draws)
    theirs = Judged(layer, SWITCH, x_BLD, [True] * 12, rules, told, scale_TD)
    ours = run(layer, x_BLD, mode="train", draws=draws)
    close(ours.y.view(-1, DIM), theirs.y)
    for name, grad in ours.grads.items():
        close(grad.view_as(theirs.grads[name]), theirs.grads[name])  # type: ignore[union-attr]


class NoAttention(torch.nn.Module):
    """Leaves the residual stream as it is."""

    def forward(self, x_BLD: Tensor, mask: None, cache: None) -> Tensor:
        return torch.zeros_like(x_BLD)


def shares(kind: str | None, seen: Tensor, weight: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What a token's routed and shared experts weigh."""
    if kind is None:
        return 1.0, 1.0
    if kind == "sigmoid":
        return 1.0, 1 / (1 + torch.exp(-(weight[0] @ seen)))
    powers = torch.exp(weight @ seen)
    return powers[0] / powers.sum(), powers[1] / powers.sum()


@pytest.mark.parametrize("kind", [None, "sigmoid", "softmax"])
def test_shared_experts_see_every_token(kind: Any) -> None:
    """Two shared experts beside the routed ones, in a block whose attention does nothing: also a
    token that lost all its routed experts passes them."""
    layer, shared = build(SWITCH, 4, capacity_factor=0.75), FeedForward(DIM, 2 * HIDDEN).double()
    mix = SharedGate(kind, DIM) if kind else None
    block = Block(DIM, 1e-5, NoAttention(), shared, layer, mix).double()  # type: ignore[arg-type]
    torch.nn.init.ones_(block.ffn_norm.weight)
    weight = torch.linspace(-1, 2, 2 * DIM).double().view(2, DIM)[: 1 if kind == "sigmoid" else 2]
    if mix:
        mix.weight = torch.nn.Parameter(weight)
    x_BLD, valid_BL = random_x(2, 6), torch.arange(12).view(2, 6) != 4
    tokens = Tokens(valid_BL, "train", None, torch.zeros(2, 6, dtype=torch.int64), 0)
    y_BLD, stats = block(x_BLD, tokens, None, None)
    assert stats.ledger.lost_tokens > 0

    gate, up = (weight.detach().T for weight in shared.w_gate_up.weight.chunk(2))
    down = shared.w_down.weight.detach().T
    halves = [slice(0, HIDDEN), slice(HIDDEN, 2 * HIDDEN)]
    both = [oracle.Expert(gate[:, half], up[:, half], down[half]) for half in halves]
    seen_TD = torch.stack([x / (x.square().mean() + 1e-5).sqrt() for x in x_BLD.view(-1, DIM)])
    logits = {"weight": seen_TD @ layer.router.weight.detach().T}
    heard = listen(SWITCH, logits, valid_BL.flatten().tolist(), given_for(layer, 2, 6, None))
    answer = oracle.layer(SWITCH, seen_TD, heard, experts_in(layer), oracle.Rules(6, 2))
    for t in range(12):
        if valid_BL.flatten()[t]:
            c_routed, c_shared = shares(kind, seen_TD[t], weight)
            always = sum(oracle.run_expert(expert, seen_TD[t]) for expert in both)
            expected = x_BLD.view(-1, DIM)[t] + c_routed * answer.y[t] + c_shared * always
            close(y_BLD.view(-1, DIM)[t], expected)


# ---- routing groups ------------------------------------------------------------------------------


def test_a_microbatch_is_one_group() -> None:
    """All tokens want expert 0, C = ⌈S/4⌉: 3 slots for 12 tokens, or twice 2 for 6, or 4 times 1
    for 3."""
    layers = {
        group: build(SWITCH, 4, capacity_factor=1.0, group=group)  # type: ignore[arg-type]
        for group in ("microbatch", "sequence", 3)
    }
    kept = {}
    for group, layer in layers.items():
        torch.nn.init.zeros_(layer.router.weight)
        kept[group] = run(layer, random_x(2, 6)).stats.ledger.outcome_EKO[0, 0].tolist()
    assert kept == {"microbatch": [3, 0, 9, 0], "sequence": [4, 0, 8, 0], 3: [4, 0, 8, 0]}


@pytest.mark.parametrize(("kind", "factor", "policy"), WAYS)
def test_micro_batches_change_nothing(kind: str, factor: float | None, policy: str) -> None:
    """4 sequences at once, or one after the other: same outputs, drops, sums and gradients."""
    x_BLD, token_BL = random_x(4, 6), torch.arange(24).view(4, 6) % 5
    layer = build(ROUTERS[kind], 4, capacity_factor=factor, drop_policy=policy)
    parameters = list(layer.parameters())
    key, valid_BL = keyed.step_key(0, 1), torch.ones(4, 6, dtype=torch.bool)

    def forward(part: slice) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
        draws = Draws(key, torch.arange(24).view(4, 6)[part].flatten())
        y, stats, *_ = layer(x_BLD[part], valid_BL[part], "train", draws, token_BL[part])
        total = (y * y).sum() + stats.balance_sum + stats.z_sum
        grads = torch.autograd.grad(total, parameters, materialize_grads=True)
        return y, stats, grads

    y, stats, grads = forward(slice(0, 4))
    ys, parts, partial = zip(*(forward(slice(b, b + 1)) for b in range(4)), strict=True)
    close(torch.cat(ys), y)
    close(torch.stack([part.balance_sum for part in parts]).sum(), stats.balance_sum)
    for record in ("ledger", "demand", "gate_mass"):
        columns = zip(*(getattr(part, record) for part in parts), strict=True)
        for count, counts in zip(getattr(stats, record), columns, strict=True):
            close(torch.stack(counts).sum(0).double(), count.double())
    for whole, pieces in zip(grads, zip(*partial, strict=True), strict=True):
        close(torch.stack(pieces).sum(0), whole)


# ---- full experts --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [kind for kind in GATES if kind != "expert_choice"])
def test_capacity_without_drops_equals_dropless(kind: str, policy: str) -> None:
    x_BLD, router = random_x(3, 8), ROUTERS[kind]
    tight = build(router, 4, capacity_factor=4.0, drop_policy=policy)
    free = build(router, 4, capacity_factor=None)
    one, other = run(tight, x_BLD), run(free, x_BLD)
    assert one.stats.ledger.outcome_EKO[..., OUTCOMES.index("dropped")].sum() == 0
    close(one.y, other.y)
    for name, grad in one.grads.items():
        close(grad, other.grads[name])  # type: ignore[arg-type]


def test_all_tokens_at_one_expert_dropless_is_that_expert() -> None:
    """Dense reference: the expert applied to everything."""
    layer = build(SWITCH, 4, capacity_factor=None)
    torch.nn.init.zeros_(layer.router.weight)
    x_BLD = random_x(2, 6)
    outcome = run(layer, x_BLD)
    expert = experts_in(layer)[0]
    expected = [0.25 * oracle.run_expert(expert, x) for x in x_BLD.view(-1, DIM)]
    close(outcome.y.view(-1, DIM), torch.stack(expected))
    assert outcome.stats.ledger.outcome_EKO[:, 0, 0].tolist() == [12, 0, 0, 0]


@pytest.mark.parametrize("router", [GSHARD, TOP2])
def test_gates_are_not_renormalised_after_a_drop(router: Router) -> None:
    """One slot each; token 0 asks for experts 0, 1 and token 1 for 1, 0. Both lose the second
    choice, and the first keeps the weight that it had: e²/(e² + e), not 1."""
    layer = build(router, 3, capacity_factor=0.75)
    x_BLD = asks(layer, [(0, 1), (1, 0)])
    outcome = run(layer, x_BLD)
    assert outcome.stats.ledger.outcome_EKO[..., OUTCOMES.index("dropped")].sum() == 2
    for t in (0, 1):
        expert_y = oracle.run_expert(experts_in(layer)[t], x_BLD[0, t])
        close(outcome.y[0, t], math.e / (math.e + 1) * expert_y)


def test_balance_is_of_what_was_asked_not_of_what_was_kept() -> None:
    """The loss and its gradient are the same whether 4 of 6 tokens are dropped or none."""
    x_BLD = random_x(1, 6)
    losses, grads = [], []
    for factor in (0.5, 4.0, None):
        layer = build(SWITCH, 4, capacity_factor=factor)
        _, stats, *_ = layer(x_BLD, torch.ones(1, 6, dtype=torch.bool), "train")
        losses.append(stats.balance_sum.detach())
        grads += torch.autograd.grad(stats.balance_sum, layer.router.weight)
    assert len({loss.item() for loss in losses}) == 1
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_a_token_that_lost_everything_gets_zero() -> None:
    """One slot: token 1 asks for the same expert as token 0. Its input gets no gradient either,
    but for the losses on the router."""
    layer = build(SWITCH, 3, capacity_factor=0.75)
    x_BLD = asks(layer, [(0,), (0,)]).requires_grad_()
    y_BLD, stats, *_ = layer(x_BLD, torch.ones(1, 2, dtype=torch.bool), "train")
    assert stats.ledger.lost_tokens == 1
    assert y_BLD[0, 0].abs().sum() > 0
    assert y_BLD[0, 1].tolist() == [0, 0, 0]
    (grad,) = torch.autograd.grad(y_BLD.sum(), x_BLD)
    assert grad[0, 1].tolist() == [0, 0, 0]


# ---- nothing is random at evaluation -------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "generate"])
@pytest.mark.parametrize(("kind", "factor", "policy"), WAYS)
def test_nothing_is_drawn_outside_training(
    kind: str, factor: float | None, policy: str, mode: str
) -> None:
    """Two evaluations are equal, whatever draws they are handed, or none."""
    layer = build(ROUTERS[kind], 4, capacity_factor=factor, drop_policy=policy)
    if mode == "generate" and kind == "expert_choice":
        mode = "eval"
    x_BLD = random_x(2, 8)
    first, second = (run(layer, x_BLD, mode=mode, draws=draws_for(16, step)) for step in (1, 2))
    same(first, second)
    same(first, run(layer, x_BLD, mode=mode))
    assert first.stats.ledger.outcome_EKO[..., OUTCOMES.index("not_sampled")].sum() == 0


@pytest.mark.parametrize(
    ("router", "options"),
    [
        (GSHARD, {}),
        (SWITCH, {"jitter": 0.3}),
        (ROUTERS["noisy_topk"], {}),
        (ROUTERS["random"], {}),
        (TOP2, {"drop_policy": "random"}),
    ],
    ids=["gshard", "jitter", "noisy_topk", "random", "drop random"],
)
def test_training_draws_anew_at_every_step(router: Router, options: dict[str, Any]) -> None:
    """The same at the same step, other outputs at another; and an error without draws."""
    layer = build(router, 4, capacity_factor=0.5, **options)
    x_BLD = random_x(2, 8)
    one, again, later = (run(layer, x_BLD, None, "train", draws_for(16, s)) for s in (1, 1, 2))
    same(one, again)
    assert not torch.equal(one.y, later.y)
    with pytest.raises(ValueError, match="draws at random in training"):
        run(layer, x_BLD, mode="train")


def test_dropping_at_random_falls_back_to_position_in_evaluation() -> None:
    by_position, at_random = (
        build(TOP2, 4, capacity_factor=0.5, drop_policy=policy) for policy in ("position", "random")
    )
    x_BLD = random_x(2, 8)
    same(run(by_position, x_BLD), run(at_random, x_BLD))
    trained = run(at_random, x_BLD, None, "train", draws_for(16))
    assert not torch.equal(trained.y, run(at_random, x_BLD).y)


def test_random_second_can_be_switched_off() -> None:
    layer = build(GSHARD, 4, random_second=False, capacity_factor=1.0)
    x_BLD = random_x(2, 8)
    same(run(layer, x_BLD, mode="train", draws=draws_for(16)), run(layer, x_BLD))


def test_training_and_evaluation_have_their_own_capacity() -> None:
    """10 tokens at one of 2 experts: 5 slots in training, 8 in evaluation, no limit in text."""
    layer = MoE(0, DIM, HIDDEN, 2, gate_of(SWITCH), capacity_factor=1.0, eval_capacity_factor=1.6)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    x_BLD, valid_BL = random_x(1, 10).float(), torch.ones(1, 10, dtype=torch.bool)
    kept = {}
    for mode in ("train", "eval", "generate"):
        _, stats, *_ = layer(x_BLD, valid_BL, mode)  # type: ignore[arg-type]
        kept[mode] = int(stats.ledger.outcome_EKO[0, 0, 0])
    assert kept == {"train": 5, "eval": 8, "generate": 10}


@pytest.mark.parametrize("group", ["sequence", "microbatch", 4])
@pytest.mark.parametrize("length", [1, 3, 5])
def test_generating_takes_text_of_any_length(group: Any, length: int) -> None:
    """A prompt, or one more token, is no multiple of the routing group."""
    layer = build(TOP2, 4, capacity_factor=1.0, group=group)
    outcome = run(layer, random_x(2, length), mode="generate")
    assert outcome.stats.ledger.outcome_EKO[..., 0].sum() == 2 * 2 * length


# ---- dense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_an_ffn_split_into_experts_with_gates_of_one_is_the_whole_ffn(experts: int) -> None:
    """The lecture's identity: y = Σ_i U_i σ(W_i x) over a split of the hidden width. SwiGLU splits
    too: gate and up lose the same columns, down the same rows."""
    whole = build(Router("dense", 1), 1)
    split = build(Router("dense", experts), experts)
    wide = 4 * HIDDEN
    generator = torch.Generator().manual_seed(3)
    gate, up = (torch.randn(DIM, wide, generator=generator).double() for _ in range(2))
    down = torch.randn(wide, DIM, generator=generator).double()
    for layer in (whole, split):
        parts = [w.chunk(layer.num_experts, dim=1) for w in (gate, up)]
        packed = [torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)]
        layer.experts.w_gate_up = torch.nn.Parameter(torch.stack(packed))
        layer.experts.w_down = torch.nn.Parameter(torch.stack(down.chunk(layer.num_experts)))
        route = layer.router.forward

        def with_gates_of_one(inputs: Any, route: Any = route) -> Routing:
            record = route(inputs)
            return record._replace(gate_TK=torch.ones_like(record.gate_TK))

        layer.router.forward = with_gates_of_one
    x_BLD = random_x(2, 5)
    one, other = run(whole, x_BLD), run(split, x_BLD)
    expert = oracle.Expert(gate, up, down)
    close(
        one.y.view(-1, DIM),
        torch.stack([oracle.run_expert(expert, x) for x in x_BLD.view(-1, DIM)]),
    )
    close(other.y, one.y)
