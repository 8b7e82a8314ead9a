"""Whole MoE layers of DeepSpeed and Hugging Face around our weights: outputs and every gradient.

Shape suffixes: B sequences, L tokens of a sequence, T tokens, D width, E experts, F expert width.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from peers import descending, every, initialised, selection
from torch import Tensor, nn

from moetrain.moe import Draws, Gate, MoE, keyed

DIM, HIDDEN, EXPERTS = 8, 12, 8


@pytest.fixture(scope="module")
def deepspeed() -> ModuleType:
    from deepspeed.moe import sharded_moe

    return sharded_moe


# ---- DeepSpeed -----------------------------------------------------------------------------------


def random_x(sequences: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(sequences, length, DIM, generator=generator).requires_grad_()


def weights(layer: MoE) -> list[Tensor]:
    return [layer.router.weight, layer.experts.w_gate_up, layer.experts.w_down]


def gradients(y_BLD: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of a scalar in which every output has a weight of its own."""
    weight = torch.linspace(-1, 2, y_BLD.numel()).view_as(y_BLD)
    return list(torch.autograd.grad((y_BLD * weight).sum(), leaves))


def deepspeed_layer(deepspeed: ModuleType, layer: MoE, x_TD: Tensor, factor: float) -> Tensor:
    """Their layer around our weights: y (T, D). Nothing is drawn that would change a choice."""
    experts, dim = layer.router.weight.shape
    gate = deepspeed.TopKGate(
        dim,
        experts,
        k=layer.gate.top_k,
        capacity_factor=factor,
        min_capacity=1,
        top2_2nd_expert_sampling=False,
    )
    del gate.wg.weight
    gate.wg.weight = layer.router.weight
    theirs = deepspeed.MOELayer(
        gate, lambda rows: layer.experts(rows[0], None)[None], "ep_size_1", 1, experts
    )
    with selection(deepspeed, descending(len(x_TD), experts)):
        return theirs(x_TD, None)


@pytest.mark.parametrize(
    ("name", "k", "factor"), [("switch", 1, 0.5), ("gshard", 2, 8.0), ("topk", 3, 8.0)]
)
def test_a_layer_and_all_its_gradients_are_deepspeeds(
    deepspeed: ModuleType, name: Any, k: int, factor: float
) -> None:
    """With one choice even when tokens are dropped; with more, where none is (renormalisation)."""
    gate = Gate(name, k, random_second=False)
    layer = initialised(MoE(0, DIM, HIDDEN, EXPERTS, gate, capacity_factor=factor))
    x_BLD = random_x(1, 32)
    y_BLD, stats, *_ = layer(x_BLD, every(32)[None], "train")
    dropped = stats.ledger.assigned - stats.ledger.row_E.sum()
    assert (dropped > 0) == (k == 1)
    theirs_BLD = deepspeed_layer(deepspeed, layer, x_BLD[0], factor)[None]
    torch.testing.assert_close(y_BLD, theirs_BLD, rtol=1e-5, atol=1e-5)
    leaves = [x_BLD, *weights(layer)]
    pairs = zip(gradients(y_BLD, leaves), gradients(theirs_BLD, leaves), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("k", "name"), [(1, "switch"), (2, "gshard")])
def test_deepspeed_draws_in_evaluation_and_we_do_not(
    deepspeed: ModuleType, k: int, name: Any
) -> None:
    """Neither its random token selection nor its second expert looks at `training`."""
    torch.manual_seed(0)
    x_TD = torch.randn(64, 8)
    theirs = deepspeed.TopKGate(8, 4, k=k, eval_capacity_factor=0.5).eval()
    first, second = (theirs(x_TD, sparse_routes=True)[3] for _ in range(2))
    assert not torch.equal(first, second)
    gate = Gate(name, k, jitter=0.1)
    layer = initialised(MoE(0, 8, 8, 4, gate, eval_capacity_factor=0.5, drop_policy="random"))
    draws = [Draws(keyed.step_key(0, step), torch.arange(64)) for step in (1, 2)]
    mine = [layer(x_TD[None], every(64)[None], "eval", draw)[0] for draw in draws]
    assert torch.equal(*mine)


# ---- Hugging Face --------------------------------------------------------------------------------


def mixtral() -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    return MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=DIM,
            intermediate_size=HIDDEN,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
        )
    )


def olmoe() -> nn.Module:
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock

    return OlmoeSparseMoeBlock(
        OlmoeConfig(
            hidden_size=DIM,
            intermediate_size=HIDDEN,
            num_experts=EXPERTS,
            num_experts_per_tok=3,
            norm_topk_prob=False,
        )
    )


def deepseek() -> nn.Module:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    return DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=DIM,
            moe_intermediate_size=HIDDEN,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            n_shared_experts=1,
            routed_scaling_factor=2.5,
        )
    )


def routed(block: Any, x_BLD: Tensor) -> Tensor:
    """What the routed experts of a block give."""
    y_BLD = block(x_BLD)
    return y_BLD - block.shared_experts(x_BLD) if hasattr(block, "shared_experts") else y_BLD


def copy_into(block: Any, layer: MoE) -> None:
    """Their matrices are ours transposed: (E, 2F, D) and (E, D, F)."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(layer.experts.w_gate_up.mT)
        block.experts.down_proj.copy_(layer.experts.w_down.mT)


@pytest.mark.parametrize(
    ("build", "gate"),
    [
        (mixtral, Gate("topk", 2)),
        (olmoe, Gate("topk", 3, renormalize=False)),
        (deepseek, Gate("sigmoid", 4, scale=2.5, groups=4, top_groups=2)),
    ],
)
def test_a_dropless_layer_and_all_its_gradients_are_hugging_faces(build: Any, gate: Gate) -> None:
    layer = initialised(MoE(0, DIM, HIDDEN, EXPERTS, gate, capacity_factor=None))
    block = build()
    copy_into(block, layer)
    x_BLD = random_x(2, 16)
    y_BLD = layer(x_BLD, torch.ones(2, 16, dtype=torch.bool), "train")[0]
    theirs_BLD = routed(block, x_BLD)
    torch.testing.assert_close(y_BLD, theirs_BLD, rtol=1e-5, atol=1e-5)
    mine = gradients(y_BLD, [x_BLD, *weights(layer)])
    names = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    theirs = gradients(theirs_BLD, [x_BLD, *names])
    theirs[2:] = [gradient.mT for gradient in theirs[2:]]
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_mixtrals_jitter_reaches_its_experts_and_the_callers_tensor() -> None:
    """It multiplies the hidden states in place; ours changes what the router sees alone."""
    block = mixtral().train()
    block.jitter_noise = 0.5
    layer = initialised(MoE(0, DIM, HIDDEN, 1, Gate("switch", 1, jitter=0.5)))
    copy_into(block, initialised(MoE(0, DIM, HIDDEN, EXPERTS, Gate("topk", 2))))
    x_BLD = random_x(1, 16).detach()
    before_BLD = x_BLD.clone()
    draws = [Draws(keyed.step_key(0, step), torch.arange(16)) for step in (1, 2)]
    mine = [layer(x_BLD, every(16)[None], "train", draw)[0] for draw in draws]
    assert torch.equal(*mine)  # a single expert with weight 1, whatever the router saw
    assert torch.equal(x_BLD, before_BLD)
    block(x_BLD)
    assert not torch.equal(x_BLD, before_BLD)
