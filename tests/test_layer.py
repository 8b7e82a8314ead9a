from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    DIM,
    GSHARD,
    HIDDEN,
    LAYER,
    SWITCH,
    TOP2,
    asks,
    build,
    draws_for,
    experts_in,
    experts_of,
    objective,
    random_x,
    run,
    same,
)
from strategies import KINDS, MANY, Case, cases, close, gradients
from torch import Tensor

from moetrain.model import Block, FeedForward
from moetrain.moe import OUTCOMES, Draws, LayerStats, MoE, keyed

# ---- against the oracle --------------------------------------------------------------------------


class Judged:
    """The oracle's run of the same layer, on leaves of its own."""

    def __init__(self, layer: MoE, case: Case, x: Tensor, uniforms: list[float] | None):
        leaves = {name: p.detach().clone() for name, p in layer.named_parameters()}
        leaves["x"] = x.detach().clone()
        for leaf in leaves.values():
            leaf.requires_grad_()
        experts = experts_of(leaves["experts.w_gate_up"], leaves["experts.w_down"])
        router_weight = leaves["router.weight"].T
        where = (case.valid, case.group_size, case.slots)
        self.answer = oracle.layer(
            case.router, leaves["x"], router_weight, experts, *where, uniforms=uniforms
        )
        self.y = torch.stack(self.answer.y)
        total = objective(self.y, self.answer.balance, self.answer.z, case.valid)
        self.grads = dict(zip(leaves, gradients(total, list(leaves.values())), strict=True))


def layer_of(case: Case, as_sequences: bool) -> MoE:
    """The case's groups are whole sequences, or pieces of one long sequence."""
    layer = build(
        case.router,
        case.experts,
        capacity_factor=case.factor,
        min_capacity=case.min_capacity,
        group="sequence" if as_sequences else case.group_size,
    )
    with torch.no_grad():
        layer.router.weight.copy_(case.numbers(case.experts, DIM, stream=2))
    return layer


@pytest.mark.parametrize("dropless", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_and_all_its_gradients_agree_with_the_oracle(kind: str, dropless: bool) -> None:
    @settings(MANY, max_examples=40)
    @given(case=cases(kind, dropless), as_sequences=st.booleans())
    def agree(case: Case, as_sequences: bool) -> None:
        x_TD = case.numbers(case.tokens, DIM, stream=3)
        layer = layer_of(case, as_sequences)
        rows = case.groups if as_sequences else 1
        mode, draws, uniforms = "eval", None, None
        if case.uniforms is not None:
            mode, draws = "train", draws_for(case.tokens, step=case.seed + 1)
            uniforms = keyed.uniform(draws, LAYER, "second expert").tolist()
        ours = run(layer, x_TD.view(rows, -1, DIM), case.valid, mode, draws)
        theirs = Judged(layer, case, x_TD, uniforms)
        close(ours.y.view(-1, DIM), theirs.y)
        close(ours.stats.balance_sum, theirs.answer.balance)
        close(ours.stats.z_sum, theirs.answer.z)
        assert_ledger(ours.stats, theirs.answer.ledger)
        assert ours.grads.keys() == theirs.grads.keys()
        for name, grad in ours.grads.items():
            assert grad is not None, name
            close(grad.view_as(theirs.grads[name]), theirs.grads[name])

    agree()


def assert_ledger(stats: LayerStats, expected: oracle.Ledger) -> None:
    outcome_EKO = torch.zeros_like(stats.ledger.outcome_EKO)
    for (expert, rank, outcome), count in expected.outcomes.items():
        outcome_EKO[expert, rank, OUTCOMES.index(outcome)] = count
    assert torch.equal(stats.ledger.outcome_EKO, outcome_EKO)
    counts = (stats.ledger.tokens, stats.ledger.lost_tokens, stats.ledger.slots)
    assert counts == (expected.tokens, expected.lost_tokens, expected.slots)


def test_jitter_scales_what_the_router_sees_and_nothing_else() -> None:
    """x·U[1-ε, 1+ε] reaches the router; experts get x itself. Gradients flow through both."""
    jitter, x_BLD = 0.3, random_x(2, 6)
    layer = build(SWITCH, 4, jitter=jitter, capacity_factor=1.0)
    draws = draws_for(12)
    scale_TD = (1 + jitter * (2 * keyed.uniform(draws, LAYER, "jitter", DIM) - 1)).double()
    assert scale_TD.min() >= 1 - jitter
    assert scale_TD.max() <= 1 + jitter
    x = x_BLD.view(-1, DIM).clone().requires_grad_()
    experts = experts_in(layer)
    slots = oracle.capacity(6, 4, 1, 1.0, 1)
    weight = layer.router.weight.detach().T
    answer = oracle.layer(SWITCH, x, weight, experts, [True] * 12, 6, slots, jitter=scale_TD)
    ours = run(layer, x_BLD, mode="train", draws=draws)
    close(ours.y.view(-1, DIM), torch.stack(answer.y))
    total = objective(torch.stack(answer.y), answer.balance, answer.z, (True,) * 12)
    close(ours.grads["x"].view(-1, DIM), gradients(total, [x])[0])  # type: ignore[union-attr]


class NoAttention(torch.nn.Module):
    """Leaves the residual stream as it is."""

    def forward(self, x_BLD: Tensor, mask: None, cache: None) -> Tensor:
        return torch.zeros_like(x_BLD)


def test_shared_experts_are_added_for_every_token() -> None:
    """Two shared experts beside the routed ones, in a block whose attention does nothing: also a
    token that lost all its routed experts passes them."""
    layer, shared = build(SWITCH, 4, capacity_factor=0.75), FeedForward(DIM, 2 * HIDDEN).double()
    block = Block(DIM, 1e-5, NoAttention(), shared, layer).double()  # type: ignore[arg-type]
    torch.nn.init.ones_(block.ffn_norm.weight)
    x_BLD, valid_BL = random_x(2, 6), torch.arange(12).view(2, 6) != 4
    y_BLD, stats = block(x_BLD, valid_BL, None, "train", None, None)
    assert stats.ledger.lost_tokens > 0
    gate, up = (weight.detach().T for weight in shared.w_gate_up.weight.chunk(2))
    down = shared.w_down.weight.detach().T
    halves = [slice(0, HIDDEN), slice(HIDDEN, 2 * HIDDEN)]
    both = [oracle.Expert(gate[:, half], up[:, half], down[half]) for half in halves]
    x_TD = x_BLD.view(-1, DIM)
    seen_TD = torch.stack([x / (x.square().mean() + 1e-5).sqrt() for x in x_TD])
    weight, where = layer.router.weight.detach().T, (valid_BL.flatten().tolist(), 6, 2)
    answer = oracle.layer(SWITCH, seen_TD, weight, experts_in(layer), *where, shared=both)
    valid_T = valid_BL.flatten()
    close(y_BLD.view(-1, DIM)[valid_T], (x_TD + torch.stack(answer.y))[valid_T])


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


@pytest.mark.parametrize("router", [SWITCH, TOP2, GSHARD])
@pytest.mark.parametrize("factor", [0.75, None])
def test_micro_batches_change_nothing(router: oracle.Router, factor: float | None) -> None:
    """4 sequences at once, or one after the other: same outputs, drops, sums and gradients."""
    x_BLD = random_x(4, 6)
    layer = build(router, 4, capacity_factor=factor)
    token_id = torch.arange(24)
    key = keyed.step_key(0, 1)
    y, stats = layer(x_BLD, torch.ones(4, 6, dtype=torch.bool), "train", Draws(key, token_id))
    whole = torch.autograd.grad((y * y).sum() + stats.balance_sum, list(layer.parameters()))
    ys, balance, total = [], 0.0, torch.zeros(())
    ledgers = []
    for b in range(4):
        draws = Draws(key, token_id[6 * b : 6 * b + 6])
        y_b, stats_b = layer(x_BLD[b : b + 1], torch.ones(1, 6, dtype=torch.bool), "train", draws)
        ys.append(y_b)
        balance = balance + stats_b.balance_sum
        total = total + (y_b * y_b).sum() + stats_b.balance_sum
        ledgers.append(stats_b.ledger)
    close(torch.cat(ys), y)
    close(balance, stats.balance_sum)  # type: ignore[arg-type]
    for i, count in enumerate(stats.ledger):
        assert torch.equal(sum(part[i] for part in ledgers), count)  # type: ignore[arg-type]
    for one, other in zip(torch.autograd.grad(total, list(layer.parameters())), whole, strict=True):
        close(one, other)


# ---- full experts --------------------------------------------------------------------------------


@pytest.mark.parametrize("router", [SWITCH, TOP2, GSHARD])
def test_capacity_without_drops_equals_dropless(router: oracle.Router) -> None:
    x_BLD = random_x(3, 8)
    tight = build(router, 4, capacity_factor=4.0)
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
def test_gates_are_not_renormalised_after_a_drop(router: oracle.Router) -> None:
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
        _, stats = layer(x_BLD, torch.ones(1, 6, dtype=torch.bool), "train")
        losses.append(stats.balance_sum.detach())
        grads += torch.autograd.grad(stats.balance_sum, layer.router.weight)
    assert len({loss.item() for loss in losses}) == 1
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_a_token_that_lost_everything_gets_zero() -> None:
    """One slot: token 1 asks for the same expert as token 0. Its input gets no gradient either,
    but for the losses on the router."""
    layer = build(SWITCH, 3, capacity_factor=0.75)
    x_BLD = asks(layer, [(0,), (0,)]).requires_grad_()
    y_BLD, stats = layer(x_BLD, torch.ones(1, 2, dtype=torch.bool), "train")
    assert stats.ledger.lost_tokens == 1
    assert y_BLD[0, 0].abs().sum() > 0
    assert y_BLD[0, 1].tolist() == [0, 0, 0]
    (grad,) = torch.autograd.grad(y_BLD.sum(), x_BLD)
    assert grad[0, 1].tolist() == [0, 0, 0]


# ---- nothing is random at evaluation -------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "generate"])
@pytest.mark.parametrize(("router", "jitter"), [(GSHARD, 0.0), (SWITCH, 0.3)])
def test_only_training_draws(router: oracle.Router, jitter: float, mode: str) -> None:
    layer = build(router, 4, jitter=jitter, capacity_factor=1.0)
    x_BLD = random_x(2, 8)
    first, second = (run(layer, x_BLD, mode=mode, draws=draws_for(16, step)) for step in (1, 2))
    same(first, second)
    same(first, run(layer, x_BLD, mode=mode))
    assert first.stats.ledger.outcome_EKO[..., OUTCOMES.index("not_sampled")].sum() == 0
    trained = [run(layer, x_BLD, mode="train", draws=draws_for(16, step)) for step in (1, 1, 2)]
    same(trained[0], trained[1])
    assert not torch.equal(trained[0].y, trained[2].y)


def test_random_second_can_be_switched_off() -> None:
    layer = build(GSHARD, 4, random_second=False, capacity_factor=1.0)
    x_BLD = random_x(2, 8)
    same(run(layer, x_BLD, mode="train", draws=draws_for(16)), run(layer, x_BLD))


def test_training_and_evaluation_have_their_own_capacity() -> None:
    """10 tokens at one of 2 experts: 5 slots in training, 8 in evaluation, no limit in text."""
    layer = MoE(0, DIM, HIDDEN, 2, 1, "switch", capacity_factor=1.0, eval_capacity_factor=1.6)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    x_BLD, valid_BL = random_x(1, 10).float(), torch.ones(1, 10, dtype=torch.bool)
    kept = {}
    for mode in ("train", "eval", "generate"):
        _, stats = layer(x_BLD, valid_BL, mode)  # type: ignore[arg-type]
        kept[mode] = int(stats.ledger.outcome_EKO[0, 0, 0])
    assert kept == {"train": 5, "eval": 8, "generate": 10}


@pytest.mark.parametrize("group", ["sequence", "microbatch", 4])
@pytest.mark.parametrize("length", [1, 3, 5])
def test_generating_takes_text_of_any_length(group: Any, length: int) -> None:
    """A prompt, or one more token, is no multiple of the routing group."""
    layer = build(TOP2, 4, capacity_factor=1.0, group=group)
    outcome = run(layer, random_x(2, length), mode="generate")
    assert outcome.stats.ledger.outcome_EKO[..., 0].sum() == 2 * 2 * length
