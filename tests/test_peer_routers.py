"""Our gates against the routers of Hugging Face's Mixtral, OLMoE and DeepSeek-V3, and their losses.

Their routers get the identity as weight, so that what they are given are the logits.
Shape suffixes: T tokens, E experts, K choices, B sequences, L tokens of a sequence.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peers import FIXED, balance_of, close, every, same_gradient, weighted
from torch import Tensor

from moetrain.moe import Gate, Router, Routing, routing
from moetrain.moe.router import Inputs

SEEDS = st.integers(0, 10_000)


def random_logits(tokens: int, experts: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(tokens, experts, generator=generator)).requires_grad_()


def with_identity(router: Any, experts: int) -> Any:
    router.weight.data = torch.eye(experts)
    return router


def mixtral(experts: int, k: int) -> Any:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter

    config = MixtralConfig(hidden_size=experts, num_local_experts=experts, num_experts_per_tok=k)
    return with_identity(MixtralTopKRouter(config), experts)


def olmoe(experts: int, k: int, renormalize: bool) -> Any:
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeTopKRouter

    config = OlmoeConfig(
        hidden_size=experts,
        num_experts=experts,
        num_experts_per_tok=k,
        norm_topk_prob=renormalize,
    )
    return with_identity(OlmoeTopKRouter(config), experts)


def deepseek(experts: int, k: int, bias_E: Tensor, **options: Any) -> Any:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Config,
        DeepseekV3TopkRouter,
    )

    single = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    config = DeepseekV3Config(
        hidden_size=experts,
        n_routed_experts=experts,
        num_experts_per_tok=k,
        **{**single, **options},
    )
    router = with_identity(DeepseekV3TopkRouter(config), experts)
    router.e_score_correction_bias.copy_(bias_E)
    return router


def by_expert(expert_TK: Tensor, gate_TK: Tensor, experts: int) -> Tensor:
    """Weights (T, E), whatever the order of the choices."""
    return gate_TK.new_zeros(len(expert_TK), experts).scatter(1, expert_TK, gate_TK)


# ---- softmax, then top-k -------------------------------------------------------------------------


@pytest.mark.parametrize("renormalize", [True, False])
def test_topk_is_olmoes_router(renormalize: bool) -> None:
    """Choices in order, weights and their gradients. (OLMoE's own setting is false.)"""

    @FIXED
    @given(seed=SEEDS, k=st.integers(1, 4))
    def agree(seed: int, k: int) -> None:
        logits_TE = random_logits(32, 8, seed)
        record = routing.topk(logits_TE, every(32), k, renormalize)
        _, theirs_TK, expert_TK = olmoe(8, k, renormalize)(logits_TE)
        assert torch.equal(record.expert_TK, expert_TK)
        close(record.gate_TK, theirs_TK)
        same_gradient(weighted(record.gate_TK), weighted(theirs_TK), logits_TE)

    agree()


def test_renormalised_topk_is_mixtrals_router() -> None:
    @FIXED
    @given(seed=SEEDS, k=st.integers(1, 4))
    def agree(seed: int, k: int) -> None:
        logits_TE = random_logits(32, 8, seed)
        record = routing.topk(logits_TE, every(32), k, renormalize=True)
        _, theirs_TK, expert_TK = mixtral(8, k)(logits_TE)
        assert torch.equal(record.expert_TK, expert_TK)
        close(record.gate_TK, theirs_TK)
        same_gradient(weighted(record.gate_TK), weighted(theirs_TK), logits_TE)

    agree()


@pytest.mark.parametrize("build", [lambda: mixtral(4, 1), lambda: olmoe(4, 1, False)])
def test_their_logits_have_the_precision_of_the_input_and_ours_fp32(build: Any) -> None:
    """Expert 1 leads by 1/512: lost in bf16's product, so that theirs sees a tie."""
    x_TD = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.bfloat16)
    weight_ED = torch.zeros(4, 4)
    weight_ED[:2, 0], weight_ED[1, 1] = 1.0, 1 / 512
    theirs = build()
    theirs.weight.data = weight_ED.bfloat16()
    their_logits_TE = theirs(x_TD)[0]
    assert their_logits_TE.dtype == torch.bfloat16
    assert their_logits_TE[0, 0] == their_logits_TE[0, 1]
    router = Router(0, Gate("topk", 1), 4, 4)
    router.weight.data = weight_ED
    record = router(Inputs(x_TD, every(1), torch.zeros(1).long(), None, None, 1, None))
    assert record.logits_TE.dtype == record.gate_TK.dtype == torch.float32
    assert record.expert_TK.tolist() == [[1]]


# ---- sigmoid -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "groups", "top_groups"), [(3, 1, 1), (4, 4, 2), (6, 4, 3)])
def test_sigmoid_is_deepseeks_router_where_two_experts_rank_a_group(
    k: int, groups: int, top_groups: int
) -> None:
    """The set chosen, weights and gradients, with a bias; it returns choices in no order."""

    @FIXED
    @given(seed=SEEDS, scale=st.sampled_from([1.0, 2.5]))
    def agree(seed: int, scale: float) -> None:
        logits_TE = random_logits(32, 16, seed)
        bias_E = random_logits(1, 16, seed + 1).detach()[0] / 10
        record = routing.sigmoid(logits_TE, bias_E, every(32), k, scale, groups, top_groups)
        options = {"n_group": groups, "topk_group": top_groups, "routed_scaling_factor": scale}
        _, gate_TK, expert_TK = deepseek(16, k, bias_E, **options)(logits_TE)
        mine = by_expert(record.expert_TK, record.gate_TK, 16)
        theirs = by_expert(expert_TK, gate_TK, 16)
        close(mine, theirs)
        same_gradient(weighted(mine), weighted(theirs), logits_TE)

    agree()


def test_deepseek_ranks_a_group_by_two_experts_whatever_a_token_may_take_of_it() -> None:
    """One expert of one group of two: here the group of the best expert (0.9 against 0.6), there
    the group of the best pair (0.6 + 0.6 against 0.9 + 0.1). The paper sums K/M of them."""
    logits_TE = torch.tensor([[0.9, 0.1, 0.6, 0.6]]).logit()
    record = routing.sigmoid(logits_TE, torch.zeros(4), every(1), k=1, num_groups=2, top_groups=1)
    theirs = deepseek(4, 1, torch.zeros(4), n_group=2, topk_group=1)
    assert record.expert_TK.tolist() == [[0]]
    assert theirs(logits_TE)[2].item() in (2, 3)


def test_deepseek_adds_an_epsilon_that_takes_the_weight_of_very_small_scores() -> None:
    """Σs + 1e-20 where Σs is 4e-26. Ours divides in the logarithm; weights add up to 1."""
    logits_TE = torch.full((1, 4), -60.0)
    record = routing.sigmoid(logits_TE, torch.zeros(4), every(1), k=2)
    theirs_TK = deepseek(4, 2, torch.zeros(4))(logits_TE)[1]
    close(record.gate_TK.sum(), torch.tensor(1.0))
    assert theirs_TK.sum() < 1e-4


def test_deepseek_can_leave_weights_undivided_and_we_cannot() -> None:
    logits_TE = random_logits(16, 8, 0).detach()
    record = routing.sigmoid(logits_TE, torch.zeros(8), every(16), k=2)
    _, gate_TK, expert_TK = deepseek(8, 2, torch.zeros(8), norm_topk_prob=False)(logits_TE)
    total_T1 = logits_TE.sigmoid().gather(1, record.expert_TK).sum(1, keepdim=True)
    mine = by_expert(record.expert_TK, record.gate_TK * total_T1, 8)
    close(mine, by_expert(expert_TK, gate_TK, 8))


# ---- balance losses ------------------------------------------------------------------------------


def their_loss(layers: list[Tensor], k: int, mask_BL: Tensor | None = None) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss = load_balancing_loss_func(tuple(layers), layers[0].shape[1], k, mask_BL)
    assert isinstance(loss, Tensor)
    return loss


def topk_loss(logits_TE: Tensor, valid_T: Tensor, k: int) -> Tensor:
    record: Routing = routing.topk(logits_TE, valid_T, k, renormalize=True)
    return balance_of(Gate("topk", k), record)


def test_the_loss_of_one_layer_is_a_kth_of_theirs() -> None:
    """With padding too, and the gradient. Theirs is K at perfect balance, ours 1."""

    @FIXED
    @given(seed=SEEDS, k=st.integers(1, 4), tail=st.integers(0, 12))
    def agree(seed: int, k: int, tail: int) -> None:
        logits_TE = random_logits(32, 8, seed)
        valid_BL = (torch.arange(16) < 16 - tail).expand(2, -1)
        mine = topk_loss(logits_TE, valid_BL.flatten(), k)
        theirs = their_loss([logits_TE], k, valid_BL) / k
        close(mine, theirs)
        same_gradient(mine, theirs, logits_TE)

    agree()


def test_layers_joined_hide_a_collapse_from_their_loss() -> None:
    """Each layer sends all to its own two of four experts: joined, the counts are even, which
    scores 2, their value of perfect balance at K = 2. Layer by layer ours is 2 as well: twice its
    value of perfect balance."""
    first_TE = torch.tensor([20.0, 20.0, 0.0, 0.0]).expand(8, -1)
    second_TE = first_TE.flip(1)
    uniform_TE = torch.zeros(8, 4)
    layers = [first_TE, second_TE]
    close(their_loss(layers, 2), torch.tensor(2.0))
    close(their_loss([uniform_TE], 2), torch.tensor(2.0))
    mean = torch.stack([topk_loss(layer, every(8), 2) for layer in layers]).mean()
    close(mean, torch.tensor(2.0))
    close(topk_loss(uniform_TE, every(8), 2), torch.tensor(1.0))
