from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import KINDS, MANY, Case, asking, cases, close, gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.moe import OUTCOMES, Draws, LayerStats, MoE, keyed
from moetrain.moe.experts import _grouped, _looped

DIM, HIDDEN = 3, 5
LAYER = 7
WEIGHTS = (0.7, 0.3)
"""What the balance and z-losses weigh in the scalar whose gradients are compared."""


def build(router: oracle.Router, experts: int, **settings_: Any) -> MoE:
    """An fp64 layer; it is in training and evaluation alike that `capacity_factor` holds."""
    factor = settings_.pop("capacity_factor", None)
    layer = MoE(
        LAYER,
        DIM,
        HIDDEN,
        experts,
        router.k,
        router.kind,  # type: ignore[arg-type]
        renormalize=router.renormalize,
        capacity_factor=factor,
        eval_capacity_factor=factor,
        **settings_,
    ).double()
    generator = torch.Generator().manual_seed(experts)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
    return layer


def draws_for(tokens: int, step: int = 1) -> Draws:
    return Draws(keyed.step_key(0, step), torch.arange(tokens))


def objective(y: Tensor, balance: Tensor, z: Tensor, valid: tuple[bool, ...]) -> Tensor:
    """A scalar in which every output of a valid token has a weight of its own."""
    weight_TD = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(-1, y.shape[-1])
    mask_T1 = torch.tensor(valid)[:, None]
    seen = torch.where(mask_T1, y.reshape(weight_TD.shape) * weight_TD, 0)
    return seen.sum() + WEIGHTS[0] * balance + WEIGHTS[1] * z


@dataclass
class Outcome:
    """One forward and backward pass."""

    y: Tensor
    stats: LayerStats
    grads: dict[str, Tensor | None]


def run(
    layer: MoE,
    x_BLD: Tensor,
    valid: tuple[bool, ...] | None = None,
    mode: str = "eval",
    draws: Draws | None = None,
) -> Outcome:
    """Forward and backward of `objective`; gradients by parameter name, and of the input as x."""
    layer.zero_grad()
    x_BLD = x_BLD.detach().requires_grad_()
    valid = valid or (True,) * x_BLD.shape[:2].numel()
    valid_BL = torch.tensor(valid).view(x_BLD.shape[:2])
    y, stats = layer(x_BLD, valid_BL, mode, draws)
    objective(y, stats.balance_sum, stats.z_sum, valid).backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return Outcome(y.detach(), stats, {**grads, "x": x_BLD.grad})


def same(one: Outcome, other: Outcome) -> None:
    """Equal in every bit."""
    assert torch.equal(one.y, other.y)
    for ours, theirs in zip(one.stats[:2], other.stats[:2], strict=True):
        assert torch.equal(ours, theirs)
    assert_same_ledger(one, other)
    for name, grad in one.grads.items():
        assert grad is not None, name
        assert torch.equal(grad, other.grads[name]), name  # type: ignore[arg-type]


def assert_same_ledger(one: Outcome, other: Outcome) -> None:
    for ours, theirs in zip(one.stats.ledger, other.stats.ledger, strict=True):
        assert torch.equal(ours, theirs)


# ---- against the oracle --------------------------------------------------------------------------


class Judged:
    """The oracle's run of the same layer, on leaves of its own."""

    def __init__(self, layer: MoE, case: Case, x: Tensor, uniforms: list[float] | None):
        leaves = {name: p.detach().clone() for name, p in layer.named_parameters()}
        leaves["x"] = x.detach().clone()
        for leaf in leaves.values():
            leaf.requires_grad_()
        gate_up, down = leaves["experts.w_gate_up"], leaves["experts.w_down"]
        experts = [
            oracle.Expert(w1=gate_up[e, :, :HIDDEN], w3=gate_up[e, :, HIDDEN:], w2=down[e])
            for e in range(case.experts)
        ]
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


def random_x(sequences: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, length, DIM, generator=generator, dtype=torch.float64)


TOP2 = oracle.Router("topk", 2)
SWITCH = oracle.Router("switch", 1)
GSHARD = oracle.Router("gshard", 2)


def test_jitter_scales_what_the_router_sees_and_nothing_else() -> None:
    """x·U[1-ε, 1+ε] reaches the router; experts get x itself. Gradients flow through both."""
    jitter, x_BLD = 0.3, random_x(2, 6)
    layer = build(SWITCH, 4, jitter=jitter, capacity_factor=1.0)
    draws = draws_for(12)
    scale_TD = (1 + jitter * (2 * keyed.uniform(draws, LAYER, "jitter", DIM) - 1)).double()
    assert scale_TD.min() >= 1 - jitter
    assert scale_TD.max() <= 1 + jitter
    x = x_BLD.view(-1, DIM).clone().requires_grad_()
    experts = experts_of(layer)
    slots = oracle.capacity(6, 4, 1, 1.0, 1)
    weight = layer.router.weight.detach().T
    answer = oracle.layer(SWITCH, x, weight, experts, [True] * 12, 6, slots, jitter=scale_TD)
    ours = run(layer, x_BLD, mode="train", draws=draws)
    close(ours.y.view(-1, DIM), torch.stack(answer.y))
    total = objective(torch.stack(answer.y), answer.balance, answer.z, (True,) * 12)
    close(ours.grads["x"].view(-1, DIM), gradients(total, [x])[0])  # type: ignore[union-attr]


def experts_of(layer: MoE) -> list[oracle.Expert]:
    gate_up, down = layer.experts.w_gate_up.detach(), layer.experts.w_down.detach()
    return [
        oracle.Expert(w1=gate_up[e, :, :HIDDEN], w3=gate_up[e, :, HIDDEN:], w2=down[e])
        for e in range(layer.num_experts)
    ]


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
    expert = experts_of(layer)[0]
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
        expert_y = oracle.run_expert(experts_of(layer)[t], x_BLD[0, t])
        close(outcome.y[0, t], math.e / (math.e + 1) * expert_y)


def asks(layer: MoE, choices: list[tuple[int, ...]]) -> Tensor:
    """Set the router so that unit vectors ask for the experts listed; returns those vectors."""
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, : len(choices)] = asking(choices, layer.num_experts).T
    return torch.eye(len(choices), DIM, dtype=torch.float64)[None]


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


# ---- ties, recomputation, precision --------------------------------------------------------------


def test_tied_logits_choose_the_first_experts_and_the_first_tokens() -> None:
    layer = build(TOP2, 5, capacity_factor=1.0)
    torch.nn.init.zeros_(layer.router.weight)
    outcome = run(layer, random_x(1, 10))
    kept_EK = outcome.stats.ledger.outcome_EKO[..., 0]
    assert kept_EK.tolist() == [[4, 0], [0, 4], [0, 0], [0, 0], [0, 0]]
    assert (outcome.y[0, :4].abs().sum(-1) > 0).all()
    assert (outcome.y[0, 4:] == 0).all()


@pytest.mark.parametrize(("router", "jitter"), [(GSHARD, 0.0), (SWITCH, 0.3)])
def test_recomputing_routes_as_before(router: oracle.Router, jitter: float) -> None:
    """Activation checkpointing runs the forward twice: same draws, same drops, same gradients."""
    layer = build(router, 4, jitter=jitter, capacity_factor=0.75)
    x_BLD, draws = random_x(2, 8), draws_for(16)
    plain = run(layer, x_BLD, mode="train", draws=draws)

    def recomputed(*args: Any) -> Any:
        return checkpoint(layer, *args, use_reentrant=False)

    recomputed.zero_grad, recomputed.named_parameters = layer.zero_grad, layer.named_parameters
    same(plain, run(recomputed, x_BLD, mode="train", draws=draws))  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [0.75, None])
def test_bf16_routes_in_fp32_and_counts_in_int64(factor: float | None) -> None:
    """Logits of 256 and 257 are the same number in bf16; 300 tokens are more than it can count."""
    layer = build(SWITCH, 2, capacity_factor=factor).bfloat16()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.tensor([256, 256])
        layer.router.weight[1, 1] = 1
    x_BLD = torch.ones(1, 301, DIM, dtype=torch.bfloat16, requires_grad=True)
    y_BLD, stats = layer(x_BLD, torch.ones(1, 301, dtype=torch.bool), "train")
    assert stats.ledger.outcome_EKO[:, 0].sum(-1).tolist() == [0, 301]
    assert all(count.dtype == torch.int64 for count in stats.ledger)
    assert layer.router(x_BLD.flatten(0, 1)).dtype == torch.float32
    assert stats.balance_sum.dtype == stats.z_sum.dtype == torch.float32
    assert y_BLD.dtype == torch.bfloat16
    (y_BLD.sum() + stats.balance_sum).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.bfloat16
        assert parameter.grad.isfinite().all(), name


# ---- nothing there: experts without tokens, padding, poison --------------------------------------


@pytest.mark.parametrize("factor", [1.0, None])
def test_an_expert_without_tokens_has_gradient_zero_not_none(factor: float | None) -> None:
    layer = build(SWITCH, 4, capacity_factor=factor)
    torch.nn.init.zeros_(layer.router.weight)
    grads = run(layer, random_x(2, 6)).grads
    for name in ("experts.w_gate_up", "experts.w_down"):
        grad = grads[name]
        assert grad is not None
        assert grad[0].abs().sum() > 0
        assert (grad[1:] == 0).all()


@pytest.mark.parametrize("factor", [1.0, None])
@pytest.mark.parametrize("router", [SWITCH, TOP2, GSHARD])
def test_a_batch_of_padding_gives_zero_everywhere(
    router: oracle.Router, factor: float | None
) -> None:
    outcome = run(build(router, 4, capacity_factor=factor), random_x(2, 6), (False,) * 12)
    assert (outcome.y == 0).all()
    assert outcome.stats.balance_sum == outcome.stats.z_sum == 0
    book = outcome.stats.ledger
    assert book.outcome_EKO.sum() == book.tokens == book.lost_tokens == 0
    for name, grad in outcome.grads.items():
        assert grad is not None, name
        assert (grad == 0).all(), name


POISONS = [float("nan"), float("inf"), -float("inf"), 1e300]


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("factor", [0.75, None])
@pytest.mark.parametrize("router", [SWITCH, TOP2, GSHARD])
def test_poison_in_padding_reaches_nothing(
    router: oracle.Router, factor: float | None, poison: float
) -> None:
    """Whatever a padded row holds: the same outputs, losses, counts and gradients, to the bit."""
    valid = (True, False, True, True, True, False) + (False,) * 6 + (True,) * 3 + (False,) * 3
    layer = build(router, 4, capacity_factor=factor)
    x_BLD = random_x(3, 6)
    bad_BLD = x_BLD.clone()
    bad_BLD.view(-1, DIM)[~torch.tensor(valid)] = poison
    draws = draws_for(18)
    clean, poisoned = (run(layer, x, valid, "train", draws) for x in (x_BLD, bad_BLD))
    same(clean, poisoned)
    padded_y = poisoned.y.view(-1, DIM)[~torch.tensor(valid)]
    assert (padded_y == 0).all()


@pytest.mark.parametrize("factor", [1.0, None])
def test_padding_is_invisible(factor: float | None) -> None:
    """Cut at the first padded token, a sequence gives what it gives with the padding (same C)."""
    layer = build(TOP2, 4, capacity_factor=None if factor is None else 1.0)
    padded = run(layer, random_x(1, 8), (True,) * 5 + (False,) * 3)
    layer.factors = dict.fromkeys(layer.factors, None if factor is None else 1.6)
    cut = run(layer, random_x(1, 8)[:, :5])
    book, cut_book = padded.stats.ledger, cut.stats.ledger
    assert torch.equal(book.outcome_EKO, cut_book.outcome_EKO)
    close(padded.y[:, :5], cut.y)
    close(padded.stats.balance_sum, cut.stats.balance_sum)
    close(padded.stats.z_sum, cut.stats.z_sum)


# ---- the grouped product -------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [0, 4, 5, 0]])
def test_the_grouped_product_equals_the_loop(counts: list[int]) -> None:
    """Forward and both gradients, with experts that have no row."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 8, generator=generator, requires_grad=True)
    weight = torch.randn(4, 8, 16, generator=generator, requires_grad=True)
    cotangent = torch.randn(9, 16, generator=generator)
    results = []
    for product in (_looped, _grouped):
        y = product(rows, weight, counts)
        results.append((y, *torch.autograd.grad(y, (rows, weight), cotangent)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_experts_apply_their_own_weights_to_their_own_rows() -> None:
    """Both layouts of rows against one row at a time."""
    layer = build(SWITCH, 3)
    rows_eRD = random_x(3, 4)
    expected = [
        [oracle.run_expert(expert, row) for row in rows]
        for expert, rows in zip(experts_of(layer), rows_eRD, strict=True)
    ]
    expected_eRD = torch.stack([torch.stack(rows) for rows in expected])
    close(layer.experts(rows_eRD, None), expected_eRD)
    ragged = torch.cat([rows_eRD[0, :1], rows_eRD[2]])
    close(layer.experts(ragged, [1, 0, 4]), torch.cat([expected_eRD[0, :1], expected_eRD[2]]))
