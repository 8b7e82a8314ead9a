"""Recomputation: the backward pass repeats what the forward pass decided, and forgets the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import parity
import pytest
import torch
from layers import ROUTERS, WAYS, build, draws_for, ids_for, objective
from layouts import CASES, Case, Layout, pick, spread
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moetrain.build import build_model
from moetrain.config import Config
from moetrain.model import Transformer, initial_value
from moetrain.moe import LayerOutput, MoE, layer, routing
from moetrain.parallel import Recompute, apply_recompute
from moetrain.testing import simulate_ranks

SEQUENCES, LENGTH, EXPERTS = 2, 12, 4
TOKENS = SEQUENCES * LENGTH
VALID_BL = (torch.arange(TOKENS) % 7 != 3).view(SEQUENCES, LENGTH)


def inputs(moe: MoE, mode: str) -> tuple[Any, ...]:
    dim = moe.experts.w_gate_up.shape[1]
    x_BLD = torch.randn(SEQUENCES, LENGTH, dim, generator=torch.Generator().manual_seed(4))
    draws = draws_for(TOKENS) if mode == "train" else None
    return x_BLD.double(), VALID_BL, mode, draws, ids_for(TOKENS).view(SEQUENCES, LENGTH)


def layer_of(kind: str, factor: float | None, policy: str) -> MoE:
    return build(ROUTERS[kind], EXPERTS, capacity_factor=factor, drop_policy=policy)


def gradients(moe: MoE, output: LayerOutput) -> list[Tensor]:
    stats = output.stats
    loss = objective(output.y_BLD, stats.balance_sum, stats.z_sum, VALID_BL.flatten().tolist())
    return list(torch.autograd.grad(loss, list(moe.parameters())))


def same(one: Any, other: Any) -> None:
    """Equal, bit by bit, through nested records."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            same(mine, theirs)
    else:
        assert one == other


# ---- a layer that is told what to decide ---------------------------------------------------------


@pytest.mark.parametrize(("kind", "factor", "policy"), WAYS)
def test_a_repeated_pass_is_the_first(kind: str, factor: float | None, policy: str) -> None:
    """Output, losses, counts and gradients, bit by bit."""
    moe = layer_of(kind, factor, policy)
    arguments = inputs(moe, "train")
    first = moe(*arguments)
    again = moe(*arguments, decided=first.decisions)
    same(tuple(again), tuple(first))
    for mine, theirs in zip(gradients(moe, again), gradients(moe, first), strict=True):
        assert torch.equal(mine, theirs)


def weigh(kind: str, moe: MoE, x_D: Tensor, experts: list[int]) -> list[float]:
    """What a token's choices weigh by the gate's formula, outside training."""
    logit = [(row * x_D).sum().item() for row in moe.router.weight]
    p = [math.exp(value) / sum(map(math.exp, logit)) for value in logit]
    if kind == "gshard":
        return [p[e] / sum(p[c] for c in experts) for e in experts]
    if kind == "noisy_topk":
        return [math.exp(logit[e]) / sum(math.exp(logit[c]) for c in experts) for e in experts]
    if kind == "sigmoid":
        s = [1 / (1 + math.exp(-value)) for value in logit]
        return [2.5 * s[e] / sum(s[c] for c in experts) for e in experts]
    if kind == "hierarchical":
        outer = [math.exp((row * x_D).sum().item()) for row in moe.router.group_weight]
        groups, size = [e // 2 for e in experts], 2
        chosen = sum(outer[g] for g in set(groups))
        inner = [
            math.exp(logit[e])
            / sum(math.exp(logit[c]) for c, of in zip(experts, groups, strict=True) if of == g)
            for e, g in zip(experts, groups, strict=True)
        ]
        assert len(experts) == len(set(groups)) * (len(experts) // size)
        return [outer[g] / chosen * value for g, value in zip(groups, inner, strict=True)]
    assert kind in ("switch", "topk", "expert_choice")
    values = [p[e] if e < EXPERTS else 0.0 for e in experts]
    return [v / sum(values) for v in values] if kind == "topk" else values


@pytest.mark.parametrize(
    "kind", ["switch", "gshard", "topk", "noisy_topk", "sigmoid", "hierarchical", "expert_choice"]
)
def test_old_choices_are_weighed_by_new_weights(kind: str) -> None:
    """With the router turned round, which would choose the opposite."""
    moe = layer_of(kind, 0.75, "position")
    arguments = inputs(moe, "eval")
    first = moe.route(*arguments)
    with torch.no_grad():
        moe.router.weight.neg_()
    anew = moe.route(*arguments)
    again = moe.route(*arguments, decided=first.decisions)
    assert not torch.equal(anew.record.expert_TK, first.record.expert_TK)
    same(tuple(again.decisions), tuple(first.decisions))
    for t in VALID_BL.flatten().nonzero().flatten().tolist():
        x_D, experts = arguments[0].flatten(0, 1)[t], again.record.expert_TK[t].tolist()
        expected = torch.tensor(weigh(kind, moe, x_D, experts), dtype=torch.float64)
        torch.testing.assert_close(again.record.gate_TK[t], expected, rtol=1e-10, atol=1e-12)


# ---- a model that forgets ------------------------------------------------------------------------


def model_of(case: Case, recompute: Recompute) -> Transformer:
    model = build_model(case.config, 31).double().to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(prefix, recurse=False):
            experts = range(case.config.moe.experts)
            value = initial_value(module, name, weight.shape, 3, 2, experts)
            weight.data.copy_(value)
    apply_recompute(model, recompute)
    return model


def losses(model: Transformer, case: Case) -> Tensor:
    batch = case.text.batch(range(4))
    output = model(
        batch.tokens_BL,
        valid_BL=batch.valid_BL,
        targets_BL=batch.targets_BL,
        document_BL=batch.document_BL,
        mode="train",
        draws=draws_for(batch.tokens_BL.numel()),
    )
    return output.loss_sum + sum(stats.balance_sum + stats.z_sum for stats in output.layers)


def trained(case: Case, recompute: Recompute) -> list[Tensor]:
    model = model_of(case, recompute)
    loss = losses(model, case)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_what_is_remembered(case: Case, recompute: Recompute) -> None:
    for mine, theirs in zip(trained(case, recompute), trained(case, "none"), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("kind", ["topk", "gshard", "limited", "hierarchical"])
def test_nothing_is_decided_in_the_backward_pass(
    kind: str, recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers route anew there (NeMo Automodel #3140, transformers #47467)."""
    calls = {"forward": 0, "backward": 0}

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            is_backward = torch._C._current_graph_task_id() != -1
            calls["backward" if is_backward else "forward"] += 1
            return function(*arguments)

        return run

    for module, name in ((routing, "choose"), (layer, "plan_capacity"), (layer, "spill")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    losses(model_of(pick(kind, dropless=False), recompute), pick(kind, dropless=False)).backward()
    assert calls["forward"] > 0
    assert calls["backward"] == 0


def flops(case: Case, recompute: Recompute) -> tuple[int, int]:
    """Of the matrix products in the forward pass, and in the backward pass."""
    model = model_of(case, recompute)
    with FlopCounterMode(display=False) as forward:
        loss = losses(model, case)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("case", [pick("topk", dropless=d) for d in (False, True)], ids=str)
def test_selective_recomputation_repeats_no_matrix_product(case: Case) -> None:
    forward, backward = flops(case, "none")
    assert flops(case, "selective") == (forward, backward)
    again = flops(case, "full")
    assert again[0] == forward
    # All of the forward pass but the logits; what comes last in a block is not needed.
    assert backward + 0.5 * forward < again[1] < backward + forward


def test_evaluation_recomputes_nothing() -> None:
    model = model_of(CASES[0], "full")
    with torch.no_grad():
        assert not losses(model, CASES[0]).requires_grad


# ---- under ranks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("kind", ["gshard", "limited", "expert_choice"])
def test_ranks_that_recompute_equal_one_process(kind: str, recompute: Recompute) -> None:
    case = next(case for case in CASES if case.gate == kind)
    sections = case.config.model_dump()
    sections["engine"]["activation_checkpointing"] = recompute
    config = spread(Config.model_validate(sections), Layout(4, ep=4, dp_replicate=1, micro=2))
    ranks = simulate_ranks(4, lambda: parity.on_rank(config, case.text, steps=1))
    parity.agree(ranks, parity.alone(case.config, case.text, steps=1))
