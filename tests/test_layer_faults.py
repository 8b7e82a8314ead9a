from __future__ import annotations

import oracle
import pytest
import torch
import torch.distributed as dist
from layers import (
    ROUTERS,
    SWITCH,
    TOP2,
    WAYS,
    Outcome,
    build,
    draws_for,
    experts_in,
    random_x,
    run,
    same,
)
from oracle_gates import Router
from strategies import DIM, GATES, close
from torch import Tensor

from moetrain.moe import AllToAll, Experts, Local, MoE
from moetrain.moe.dispatch import Arrived
from moetrain.moe.ledger import is_conserved
from moetrain.moe.router import Inputs
from moetrain.moe.rows import combine_rows
from moetrain.testing import simulate_ranks

EVERY_WAY = pytest.mark.parametrize(("kind", "factor", "policy"), WAYS)


def layer_for(kind: str, factor: float | None, policy: str) -> MoE:
    return build(ROUTERS[kind], 4, capacity_factor=factor, drop_policy=policy)


# ---- ties, recomputation, precision --------------------------------------------------------------


def test_tied_logits_choose_the_first_experts_and_the_first_tokens() -> None:
    layer = build(TOP2, 5, capacity_factor=1.0)
    torch.nn.init.zeros_(layer.router.weight)
    outcome = run(layer, random_x(1, 10))
    kept_EK = outcome.stats.ledger.outcome_EKO[..., 0]
    assert kept_EK.tolist() == [[4, 0], [0, 4], [0, 0], [0, 0], [0, 0]]
    assert (outcome.y[0, :4].abs().sum(-1) > 0).all()
    assert (outcome.y[0, 4:] == 0).all()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", [k for k in GATES if k not in ("hash", "random", "balanced")])
def test_tied_logits_choose_the_same_at_every_ep(kind: str, num_ranks: int) -> None:
    """Routers of zeros, or of equal rows, leave everything to the order of experts and tokens: on
    each rank of 13 tokens and 12 experts (odd ones for a vector unit) as in one process with all
    of them."""
    router = Router("dense", 12) if kind == "dense" else ROUTERS[kind]

    def build_tied(weight: float) -> MoE:
        layer = build(router, 12, capacity_factor=0.75)
        for parameter in layer.router.parameters():
            torch.nn.init.constant_(parameter, weight)
        return layer

    for weight in (0.0, 0.3):
        x_BLD = random_x(4, 13)
        whole = run(build_tied(weight), x_BLD)

        def one_rank(weight: float = weight, x_BLD: Tensor = x_BLD) -> Outcome:
            layer = spread(build_tied(weight))
            return run(layer, x_BLD.chunk(num_ranks)[dist.get_rank()])

        ranks = simulate_ranks(num_ranks, one_rank)
        outcome_EKO = torch.stack([rank.stats.ledger.outcome_EKO for rank in ranks]).sum(0)
        assert torch.equal(outcome_EKO, whole.stats.ledger.outcome_EKO)
        close(torch.cat([rank.y for rank in ranks]), whole.y)


def spread(layer: MoE) -> MoE:
    """Leave this rank's share of the experts, and join the ranks by all-to-all."""
    held = layer.num_experts // dist.get_world_size()
    for name, weight in list(layer.experts.named_parameters()):
        mine = weight.detach().split(held)[dist.get_rank()].clone()
        setattr(layer.experts, name, torch.nn.Parameter(mine))
    assert dist.group.WORLD is not None
    layer.dispatcher = AllToAll(dist.group.WORLD)
    return layer


@EVERY_WAY
def test_recomputing_routes_as_before(kind: str, factor: float | None, policy: str) -> None:
    """Activation checkpointing runs the forward twice: same draws, same drops, same gradients."""
    layer, x_BLD, draws = layer_for(kind, factor, policy), random_x(2, 8), draws_for(16)
    plain = run(layer, x_BLD, mode="train", draws=draws)
    again = run(layer, x_BLD, mode="train", draws=draws, recompute=True)
    same(plain, again)


def test_jitter_is_recomputed_as_before() -> None:
    layer, x_BLD, draws = build(SWITCH, 4, jitter=0.3), random_x(2, 8), draws_for(16)
    plain, again = (
        run(layer, x_BLD, mode="train", draws=draws, recompute=recompute)
        for recompute in (False, True)
    )
    same(plain, again)


@pytest.mark.parametrize("factor", [0.75, None])
def test_bf16_routes_in_fp32_and_counts_in_int64(factor: float | None) -> None:
    """Logits of 256 and 257 are the same number in bf16; 300 tokens are more than it can count."""
    layer = build(SWITCH, 2, capacity_factor=factor).bfloat16()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.tensor([256, 256])
        layer.router.weight[1, 1] = 1
    x_BLD = torch.ones(1, 301, DIM, dtype=torch.bfloat16, requires_grad=True)
    y_BLD, stats, *_ = layer(x_BLD, torch.ones(1, 301, dtype=torch.bool), "train")
    assert stats.ledger.outcome_EKO[:, 0].sum(-1).tolist() == [0, 301]
    assert all(count.dtype == torch.int64 for count in stats.ledger)
    routing = layer.router(inputs_of(x_BLD))
    assert routing.logits_TE.dtype == routing.gate_TK.dtype == torch.float32
    assert stats.balance_sum.dtype == stats.z_sum.dtype == torch.float32
    assert y_BLD.dtype == torch.bfloat16
    (y_BLD.sum() + stats.balance_sum).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.bfloat16
        assert parameter.grad.isfinite().all(), name


def inputs_of(x_BLD: Tensor, slots: int | None = None) -> Inputs:
    tokens = x_BLD.shape[:2].numel()
    valid_T, number_T = torch.ones(tokens, dtype=torch.bool), torch.arange(tokens)
    return Inputs(x_BLD.flatten(0, 1), valid_T, number_T, number_T, None, x_BLD.shape[1], slots)


@pytest.mark.parametrize("kind", GATES)
def test_every_gate_is_fp32_for_bf16_tokens(kind: str) -> None:
    layer = build(ROUTERS[kind], 4).bfloat16()
    routing = layer.router(inputs_of(random_x(2, 6).bfloat16(), slots=3))
    for part in (routing.gate_TK, routing.prob_TE, routing.logits_TE, routing.score_TE):
        assert part.dtype == torch.float32
    assert routing.expert_TK.dtype == torch.int64


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


@pytest.mark.parametrize("mode", ["train", "eval"])
@EVERY_WAY
def test_a_batch_of_padding_gives_zero_everywhere(
    kind: str, factor: float | None, policy: str, mode: str
) -> None:
    layer = layer_for(kind, factor, policy)
    outcome = run(layer, random_x(2, 6), (False,) * 12, mode, draws_for(12))
    assert (outcome.y == 0).all()
    stats = outcome.stats
    assert stats.balance_sum == stats.z_sum == 0
    assert all((count == 0).all() for count in stats.ledger)
    assert stats.gate_mass == (0, 0)
    assert all((part == 0).all() for part in stats.demand)
    for name, grad in outcome.grads.items():
        assert grad is not None, name
        assert (grad == 0).all(), name


POISONS = [float("nan"), float("inf"), -float("inf"), 1e300]


@EVERY_WAY
def test_poison_in_padding_reaches_nothing(kind: str, factor: float | None, policy: str) -> None:
    """Whatever a padded row holds: the same outputs, losses, counts and gradients, to the bit."""
    valid = (True, False, True, True, True, False) + (False,) * 6 + (True,) * 3 + (False,) * 3
    layer, x_BLD, draws = layer_for(kind, factor, policy), random_x(3, 6), draws_for(18)
    clean = run(layer, x_BLD, valid, "train", draws)
    for poison in POISONS:
        bad_BLD = x_BLD.clone()
        bad_BLD.view(-1, DIM)[~torch.tensor(valid)] = poison
        poisoned = run(layer, bad_BLD, valid, "train", draws)
        same(clean, poisoned)
        assert (poisoned.y.view(-1, DIM)[~torch.tensor(valid)] == 0).all()


@pytest.mark.parametrize("factor", [1.0, None])
def test_padding_is_invisible(factor: float | None) -> None:
    """Cut at the first padded token, a sequence gives what it gives with the padding (same C)."""
    layer = build(TOP2, 4, capacity_factor=factor)
    padded = run(layer, random_x(1, 8), (True,) * 5 + (False,) * 3)
    layer.factors = dict.fromkeys(layer.factors, None if factor is None else 1.6)
    cut = run(layer, random_x(1, 8)[:, :5])
    book, cut_book = padded.stats.ledger, cut.stats.ledger
    assert torch.equal(book.outcome_EKO, cut_book.outcome_EKO)
    close(padded.y[:, :5], cut.y)
    close(padded.stats.balance_sum, cut.stats.balance_sum)
    close(padded.stats.z_sum, cut.stats.z_sum)


# ---- NaN in a real token; garbage past the last group --------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@EVERY_WAY
def test_a_token_of_nan_spoils_itself_alone(
    kind: str, factor: float | None, policy: str, poison: float
) -> None:
    """No crash and no hang; its own output is not finite where an expert computed it, everybody
    else's is, and the ledger adds up. (It may still take a slot, as a token of its kind does.)"""
    layer, x_BLD = layer_for(kind, factor, policy), random_x(2, 6)
    x_BLD[0, 2] = poison
    outcome = run(layer, x_BLD, mode="train", draws=draws_for(12))
    spoiled_BL = ~outcome.y.isfinite().all(-1)
    spoiled_BL[0, 2] = False
    assert not spoiled_BL.any()
    assert bool(is_conserved(outcome.stats.ledger))
    assert all(grad is not None for grad in outcome.grads.values())


@EVERY_WAY
def test_logits_of_nan_crash_nothing(kind: str, factor: float | None, policy: str) -> None:
    """A router that has diverged altogether: every count is still exact, for the step to skip."""
    layer = layer_for(kind, factor, policy)
    for parameter in layer.router.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    outcome = run(layer, random_x(2, 6), mode="train", draws=draws_for(12))
    assert bool(is_conserved(outcome.stats.ledger))
    assert outcome.stats.ledger.tokens == 12
    if list(layer.router.parameters()):
        assert not outcome.stats.z_sum.isfinite()


class Poisoned(Local):
    """Finds garbage in every row that the plan did not fill, as a grouped product may leave."""

    def combine(self, experts: Experts, arrived: Arrived, gate_TK: Tensor) -> Tensor:
        plan, rows = arrived.plan, experts(arrived.rows, arrived.counts)
        flat_RD = rows.reshape(-1, rows.shape[-1])
        missing = plan.source_R.numel() - len(flat_RD)  # dropless, the empty tail is left off
        flat_RD = torch.cat([flat_RD, flat_RD.new_full((missing, DIM), torch.nan)])
        empty_R = plan.source_R == plan.row_TK.numel()
        assert empty_R.any()
        return combine_rows(flat_RD.masked_fill(empty_R[:, None], torch.nan), gate_TK, plan)


@EVERY_WAY
def test_garbage_in_empty_rows_reaches_nothing(
    kind: str, factor: float | None, policy: str
) -> None:
    """Outputs, losses and every gradient are those of clean rows."""
    valid = tuple(i % 4 != 1 for i in range(12))
    outcomes = []
    for dispatcher in (Local(), Poisoned()):
        layer = layer_for(kind, factor and 1.5, policy)
        layer.dispatcher = dispatcher
        outcomes.append(run(layer, random_x(2, 6), valid, "train", draws_for(12)))
    same(*outcomes)


# ---- everybody at one expert ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["switch", "topk", "sigmoid", "noisy_topk"])
def test_all_tokens_at_one_expert_dropless_equal_the_dense_reference(kind: str) -> None:
    """K = 1 at a router that prefers expert 2: the expert applied to every token, weighed as the
    gate says; nothing lost."""
    layer = build(Router(kind, 1, renormalize=False), 4)
    x_BLD = random_x(2, 6).abs()
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[-1.0], [-2.0], [1.0], [-3.0]]).expand(4, DIM))
    outcome = run(layer, x_BLD)
    assert outcome.stats.ledger.row_E.tolist() == [0, 0, 12, 0]
    x_TD = x_BLD.view(-1, DIM)
    gate_T = (x_TD @ layer.router.weight.detach().T).softmax(-1)[:, 2]
    gate_T = gate_T if kind in ("switch", "topk") else torch.ones_like(gate_T)
    expert = experts_in(layer)[2]
    y_TD = [oracle.run_expert(expert, x) * g for x, g in zip(x_TD, gate_T, strict=True)]
    close(outcome.y.view(-1, DIM), torch.stack(y_TD))


@pytest.mark.parametrize("policy", ["position", "probability", "random", "spill"])
def test_all_tokens_at_one_expert_are_accounted_for(policy: str) -> None:
    """12 tokens at expert 0, three slots a group of 12: 3 kept. Spilling once, three go on to
    expert 1 as well."""
    layer = build(
        SWITCH, 4, capacity_factor=1.0, drop_policy=policy, group="microbatch", spill_depth=1
    )
    torch.nn.init.zeros_(layer.router.weight)
    book = run(layer, random_x(2, 6), mode="train", draws=draws_for(12)).stats.ledger
    spilled = 3 if policy == "spill" else 0
    assert book.outcome_EKO[0, 0].tolist() == [3, spilled, 9 - spilled, 0]
    assert book.row_E.tolist() == [3, spilled, 0, 0]
    assert book.lost_tokens == 9 - spilled
