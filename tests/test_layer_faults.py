from __future__ import annotations

import oracle
import pytest
import torch
from layers import DIM, GSHARD, SWITCH, TOP2, build, draws_for, random_x, run, same
from strategies import close

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
    again = run(layer, x_BLD, mode="train", draws=draws, recompute=True)
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
    layer = build(TOP2, 4, capacity_factor=factor)
    padded = run(layer, random_x(1, 8), (True,) * 5 + (False,) * 3)
    layer.factors = dict.fromkeys(layer.factors, None if factor is None else 1.6)
    cut = run(layer, random_x(1, 8)[:, :5])
    book, cut_book = padded.stats.ledger, cut.stats.ledger
    assert torch.equal(book.outcome_EKO, cut_book.outcome_EKO)
    close(padded.y[:, :5], cut.y)
    close(padded.stats.balance_sum, cut.stats.balance_sum)
    close(padded.stats.z_sum, cut.stats.z_sum)
