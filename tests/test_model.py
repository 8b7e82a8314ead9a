"""The transformer against literal loops, and what no token may learn of another."""

from __future__ import annotations

import cmath
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, initialised, random_tokens, small_config
from strategies import close
from torch import Tensor

from moetrain.build import build_model
from moetrain.loss import IGNORED
from moetrain.model import Attention, FeedForward, KVCache, RMSNorm, Tokens, initial_value, rotate
from moetrain.moe import Experts, Gate, MoE

FEW = settings(max_examples=20, deadline=None)
THETA = 50.0
DROPLESS = {"capacity_factor": None, "eval_capacity_factor": None}
ROUTERS: dict[str, dict[str, Any]] = {
    "switch": {"top_k": 1},
    "gshard": {"top_k": 2},
    "topk": {"top_k": 3},
    "noisy_topk": {},
    "sigmoid": {"expert_groups": 2, "top_groups": 1},
    "hash": {},
    "random": {},
    "balanced": {},
    "dense": {"top_k": 4},
    "hierarchical": {"expert_groups": 2, "top_groups": 2},
}


# ---------------------------------------------------------------- parts against loops


def literal_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x * x).sum() / len(x) + eps) ** 0.5 * weight


def literal_rotation(x_h: Tensor, position: int) -> Tensor:
    """Pairs (i, i + h/2) as complex numbers, each turned by its own angle."""
    half = len(x_h) // 2
    turned = torch.empty_like(x_h)
    for i in range(half):
        angle = position * THETA ** (-2 * i / (2 * half))
        pair = complex(x_h[i].item(), x_h[half + i].item()) * cmath.exp(1j * angle)
        turned[i], turned[half + i] = pair.real, pair.imag
    return turned


def literal_attention(attention: Attention, x_LD: Tensor, document_L: list[int]) -> Tensor:
    """One position and one head after the other; a query head reads its group's keys."""
    length, heads, kv_heads = len(x_LD), attention.heads, attention.kv_heads
    width = attention.wq.weight.shape[0] // heads

    def head(weight: Tensor, norm: RMSNorm | None, position: int, number: int) -> Tensor:
        mine = slice(number * width, (number + 1) * width)
        value = weight @ x_LD[position]
        if norm is not None and len(norm.weight) == len(value):
            value = literal_norm(value, norm.weight, norm.eps)[mine]
        elif norm is not None:
            value = literal_norm(value[mine], norm.weight, norm.eps)
        else:
            value = value[mine]
        return literal_rotation(value, position)

    rows = []
    for t in range(length):
        mixed = []
        for number in range(heads):
            shared = number * kv_heads // heads
            query = head(attention.wq.weight, attention.q_norm, t, number)
            seen = [s for s in range(t + 1) if document_L[s] == document_L[t]]
            scores = [
                query @ head(attention.wk.weight, attention.k_norm, s, shared) / width**0.5
                for s in seen
            ]
            weights = torch.stack(scores).softmax(0)
            rows_of_v = attention.wv.weight[shared * width : (shared + 1) * width]
            mixed.append(sum(w * (rows_of_v @ x_LD[s]) for w, s in zip(weights, seen, strict=True)))
        rows.append(attention.wo.weight @ torch.cat(mixed))  # type: ignore[arg-type]
    return torch.stack(rows)


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(4, 4), (2, 4), (1, 4), (2, 6)])
@pytest.mark.parametrize("document_L", [[0] * 6, [0, 0, 1, 1, 1, 2]])
@torch.no_grad()
def test_attention_is_the_literal_loop(kv_heads, head_dim, qk_norm, document_L):
    attention = Attention(
        0, 16, 4, kv_heads, head_dim, rope_theta=THETA, qk_norm=qk_norm, norm_eps=1e-3
    ).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in attention.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x_BLD = torch.randn(2, 6, 16, generator=generator, dtype=torch.float64)
    document = torch.tensor(document_L)
    mask = (document[:, None] == document).tril() if document.any() else None
    y_BLD = attention(x_BLD, mask, None)
    for x_LD, y_LD in zip(x_BLD, y_BLD, strict=True):
        close(y_LD, literal_attention(attention, x_LD, document_L))


vectors = st.integers(0, 999).map(
    lambda seed: torch.randn(8, generator=torch.Generator().manual_seed(seed)).double()
)
positions = st.integers(0, 1000)


def turned(x_h: Tensor, position: int) -> Tensor:
    return rotate(x_h.view(1, 1, 1, -1), torch.tensor([position]), THETA).flatten()


@FEW
@given(vectors, vectors, positions, positions, positions)
def test_rotary_scores_depend_on_the_distance_alone(query, key, here, there, shift):
    score = turned(query, here) @ turned(key, there)
    moved = turned(query, here + shift) @ turned(key, there + shift)
    torch.testing.assert_close(moved, score, rtol=1e-9, atol=1e-9)
    close(turned(query, here), literal_rotation(query, here))
    close(turned(query, 0), query)


def test_rotary_angles_stay_exact_at_low_precision():
    # In bf16 itself, position 4001 would not even be a number.
    x = torch.randn(8, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = turned(x, 4001)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), turned(x.double(), 4001), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_norm_divides_by_the_root_mean_square_in_fp32_at_least(dtype):
    norm = RMSNorm(16, 1e-2).to(dtype)
    generator = torch.Generator().manual_seed(0)
    norm.weight.copy_(torch.randn(16, generator=generator))
    x_TD = (torch.randn(3, 16, generator=generator) * torch.tensor([[1e-3], [1.0], [1e3]])).to(
        dtype
    )
    y_TD = norm(x_TD)
    assert y_TD.dtype == dtype
    wide = [literal_norm(x.double(), norm.weight.double(), 1e-2) for x in x_TD]
    torch.testing.assert_close(y_TD, torch.stack(wide).to(dtype), rtol=1e-12, atol=0)


@torch.no_grad()
def test_feed_forward_is_swiglu():
    ffn = FeedForward(4, 6).double()
    x_D = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate, up = ffn.w_gate_up.weight[:6] @ x_D, ffn.w_gate_up.weight[6:] @ x_D
    hidden = gate / (1 + (-gate).exp()) * up
    close(ffn(x_D[None, None])[0, 0], ffn.w_down.weight @ hidden)


# ---------------------------------------------------------------- who sees whom


def logits(model, tokens_BL: Tensor, **options) -> Tensor:
    result = model(tokens_BL, **options).logits_BLV
    assert result is not None
    return result


def replaced(tokens_BL: Tensor, position: int) -> Tensor:
    changed = tokens_BL.clone()
    changed[:, position] = (changed[:, position] + 1) % VOCAB
    return changed


MODELS = {
    "dense": {"moe": {"experts": 0}},
    **{
        f"{router}, dropless": {"moe": {"router": router, **options, **DROPLESS}}
        for router, options in ROUTERS.items()
    },
    "switch, 1 slot": {
        "moe": {"router": "switch", "top_k": 1, "eval_capacity_factor": 0.1, "shared_experts": 1}
    },
}


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_no_token_sees_a_later_one(kind):
    model = initialised(small_config(**MODELS[kind]))
    tokens_BL = random_tokens(3, 8)
    before = logits(model, tokens_BL)
    for position in range(8):
        after = logits(model, replaced(tokens_BL, position))
        close(after[:, :position], before[:, :position])
        assert ((after - before)[:, position].abs().amax(-1) > 1e-6).all()


@torch.no_grad()
def test_with_capacity_and_two_choices_a_later_first_choice_beats_an_earlier_second_one():
    """What `position` means: first choices of the whole group come before any second choice."""
    layer = MoE(0, 3, 5, 3, Gate("topk", 2), eval_capacity_factor=0.1).double()  # one slot each
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x_BLD, valid = torch.eye(2, 3, dtype=torch.float64)[None], torch.ones(1, 2, dtype=torch.bool)

    def first_token(choices: list[tuple[int, int]]) -> Tensor:
        layer.router.weight.zero_()
        for token, (first, second) in enumerate(choices):
            layer.router.weight[[first, second], token] = torch.tensor([2.0, 1.0]).double()
        return layer(x_BLD, valid, "eval")[0][0, 0]

    alone = first_token([(0, 1), (2, 0)])
    robbed = first_token([(0, 1), (1, 2)])
    assert not torch.allclose(alone, robbed)
    layer.factors["eval"] = None
    close(first_token([(0, 1), (2, 0)]), first_token([(0, 1), (1, 2)]))


def test_no_gradient_reaches_a_later_token():
    model = initialised(small_config(model={"tie_embeddings": False}, moe=DROPLESS))
    tokens_1L = torch.arange(8)[None]  # all different, so every position has its own row
    for position in range(8):
        model.zero_grad()
        logits(model, tokens_1L)[0, position].square().sum().backward()
        grad_L = model.embedding.weight.grad[:8].abs().sum(1)
        assert grad_L[position + 1 :].eq(0).all()
        assert grad_L[: position + 1].gt(0).all()


def test_no_document_sees_another():
    model = initialised(small_config(model={"tie_embeddings": False}, moe=DROPLESS))
    tokens_1L, document_1L = torch.arange(8)[None], torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]])
    plain = logits(model, tokens_1L)
    packed = logits(model, tokens_1L, document_BL=document_1L)
    for number in range(3):
        inside = document_1L[0] == number
        close(packed[:, inside], logits(model, tokens_1L[:, inside]))
        model.zero_grad()
        packed[:, inside].square().sum().backward(retain_graph=True)
        grad_L = model.embedding.weight.grad[:8].abs().sum(1)
        assert grad_L[~inside].eq(0).all()
        assert grad_L[inside].gt(0).all()
    assert not torch.allclose(packed[:, 3:], plain[:, 3:])


def test_documents_are_each_sequences_own():
    model = initialised(small_config(moe=DROPLESS))
    tokens_BL = random_tokens(2, 8)
    document_BL = torch.tensor([[0] * 8, [0] * 4 + [1] * 4])
    both = logits(model, tokens_BL, document_BL=document_BL)
    close(both[:1], logits(model, tokens_BL[:1]))
    close(both[1:, 4:], logits(model, tokens_BL[1:, 4:]))


def loss_and_grads(model, tokens_BL, valid_BL):
    """One backward pass of everything that training minimises; padding carries no target."""
    model.zero_grad()
    targets_BL = ((3 * tokens_BL + 1) % VOCAB).masked_fill(~valid_BL, IGNORED)
    output = model(tokens_BL, valid_BL=valid_BL, targets_BL=targets_BL)
    auxiliary = sum(stats.balance_sum + stats.z_sum for stats in output.layers)
    (output.loss_sum + auxiliary).backward()
    return output, [p.grad for p in model.parameters()]


def assert_same_training(one, two):
    """Loss, statistics and every gradient."""
    (output, grads), (other, other_grads) = one, two
    close(output.loss_sum, other.loss_sum)
    for grad, other_grad in zip(grads, other_grads, strict=True):
        close(grad, other_grad)
    for stats, others in zip(output.layers, other.layers, strict=True):
        close(stats.balance_sum, others.balance_sum)
        close(stats.z_sum, others.z_sum)
        assert torch.equal(stats.ledger.outcome_EKO, others.ledger.outcome_EKO)
        assert stats.ledger.tokens == others.ledger.tokens


@pytest.mark.parametrize("factor", [None, 0.5, 2.0])
@pytest.mark.parametrize("router", ROUTERS)
def test_padding_on_the_right_is_invisible(router, factor):
    moe = {"router": router, **ROUTERS[router], "eval_capacity_factor": factor}
    model = initialised(small_config(moe=moe))
    valid_BL = torch.tensor([[True] * 4 + [False] * 4, [True] * 8, [False] * 8])
    tokens_BL = random_tokens(3, 8)
    other_BL = torch.where(valid_BL, tokens_BL, random_tokens(3, 8, seed=1))
    real, other = (loss_and_grads(model, t, valid_BL) for t in (tokens_BL, other_BL))
    assert_same_training(real, other)
    for stats in real[0].layers:
        assert stats.ledger.tokens == 12
        assert stats.ledger.outcome_EKO.sum() == 12 * stats.ledger.outcome_EKO.shape[1]
    with torch.no_grad():
        close(*(logits(model, t, valid_BL=valid_BL)[valid_BL] for t in (tokens_BL, other_BL)))


def test_padding_adds_nothing_to_a_shorter_sequence():
    model = initialised(small_config(moe=DROPLESS))
    tokens_BL, valid_BL = random_tokens(2, 8), torch.arange(8).expand(2, 8) < 5
    short = loss_and_grads(model, tokens_BL[:, :5], valid_BL[:, :5])
    assert_same_training(loss_and_grads(model, tokens_BL, valid_BL), short)


@FEW
@given(st.sets(st.integers(1, 7)), st.sampled_from(["none", "head", "full"]))
@torch.no_grad()
def test_a_cache_continues_as_if_all_had_been_given_at_once(cuts, qk_norm):
    config = small_config(model={"kv_heads": 2, "qk_norm": qk_norm})
    model = initialised(config)
    tokens_BL = random_tokens(2, 8)
    cache = KVCache(config.model.layers, capacity=8)
    bounds = itertools.pairwise([0, *sorted(cuts), 8])
    parts = [logits(model, tokens_BL[:, a:b], mode="generate", cache=cache) for a, b in bounds]
    assert cache.length == 8
    close(torch.cat(parts, 1), logits(model, tokens_BL, mode="generate"))


# ---------------------------------------------------------------- structure


def test_tied_embeddings_are_one_weight_with_both_gradients():
    tied = initialised(small_config())
    untied = initialised(small_config(model={"tie_embeddings": False}))
    assert tied.head is None
    assert untied.head is not None
    with torch.no_grad():
        untied.head.weight.copy_(untied.embedding.weight)
    tokens_BL = random_tokens(2, 8)
    for model in (tied, untied):
        output = model(tokens_BL, targets_BL=tokens_BL.roll(-1, 1))
        output.loss_sum.backward()
    close(logits(tied, tokens_BL), logits(untied, tokens_BL))
    close(tied.embedding.weight.grad, untied.embedding.weight.grad + untied.head.weight.grad)
    names = {name for name, _ in untied.named_parameters()}
    assert names - {name for name, _ in tied.named_parameters()} == {"head.weight"}


@pytest.mark.parametrize(
    ("every", "first_dense", "experts_at"),
    [(1, 0, (0, 1, 2, 3, 4)), (1, 2, (2, 3, 4)), (2, 0, (1, 3)), (2, 2, (3,)), (3, 0, (2,))],
)
@torch.no_grad()
def test_every_layout_of_blocks(every, first_dense, experts_at):
    config = small_config(model={"layers": 5}, moe={"every": every, "first_dense": first_dense})
    model = initialised(config)
    assert tuple(i for i, b in enumerate(model.blocks) if b.moe is not None) == experts_at
    assert all((b.moe is None) == (b.feed_forward is not None) for b in model.blocks)
    assert tuple(b.moe.layer for b in model.blocks if b.moe is not None) == experts_at
    tokens_BL = random_tokens(2, 8)
    output = model(tokens_BL, targets_BL=tokens_BL)
    assert len(output.layers) == len(experts_at)
    assert output.logits_BLV is None
    assert output.loss_sum.isfinite()


@pytest.mark.parametrize("kind", ["none", "sigmoid", "softmax"])
@torch.no_grad()
def test_shared_experts_stand_beside_the_routed_ones(kind):
    model = initialised(small_config(moe={"shared_experts": 3, "shared_gate": kind}))
    block = model.blocks[0]
    assert block.feed_forward.w_down.weight.shape == (16, 3 * 12)
    x_BLD = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)).double()
    tokens = Tokens(torch.ones(1, 8, dtype=torch.bool), "eval", None, random_tokens(1, 8), 0)
    h_BLD = x_BLD + block.attention(block.attention_norm(x_BLD), None, None)
    n_BLD = block.ffn_norm(h_BLD)
    routed, shared = block.moe(n_BLD, *tokens)[0], block.feed_forward(n_BLD)
    for t in range(8):
        of_routed, of_shared = 1.0, 1.0
        if kind == "sigmoid":
            of_shared = 1 / (1 + math.exp(-(block.shared_gate.weight[0] @ n_BLD[0, t])))
        if kind == "softmax":
            powers = [math.exp(row @ n_BLD[0, t]) for row in block.shared_gate.weight]
            of_routed, of_shared = (power / sum(powers) for power in powers)
        expected = h_BLD[0, t] + of_routed * routed[0, t] + of_shared * shared[0, t]
        close(block(x_BLD, tokens, None, None)[0][0, t], expected)


# ---------------------------------------------------------------- initial values

WIDE = small_config(
    model={"dim": 256, "layers": 3, "ffn_dim": 320, "tie_embeddings": False, "qk_norm": "full"},
    moe={"experts": 16, "expert_ffn_dim": 64, "first_dense": 1},
)
CUT = 0.98658
"""Standard deviation of a unit normal cut at ±3."""


def fan_in(name: str) -> int:
    """Inputs of a matrix, from the configuration and not from its shape."""
    if "moe.experts.w_down" in name:
        return 64
    return 320 if "feed_forward.w_down" in name else 256


def test_matrices_start_with_the_documented_spread_and_norms_at_one():
    for name, parameter in initialised(WIDE, torch.float32).named_parameters():
        if "norm" in name:
            assert parameter.eq(1).all(), name
            continue
        depth = 2 * 3 if "wo" in name or "w_down" in name else 1
        std = (fan_in(name) * depth) ** -0.5
        assert parameter.std().item() == pytest.approx(CUT * std, rel=0.04), name
        assert parameter.abs().max() <= 3 * std, name
        assert parameter.mean().abs() < 5 * std / parameter.numel() ** 0.5, name


def values(seed: int, name: str, experts: range) -> Tensor:
    with torch.device("meta"):
        module = Experts(8, 6, 5)
    shape = module.w_down.shape
    return initial_value(module, name, shape, seed, num_layers=2, experts=experts)


def test_experts_are_distinct_and_do_not_depend_on_which_of_them_are_asked_for():
    whole = values(3, "blocks.0.moe.experts.w_down", range(8))
    assert torch.equal(whole, values(3, "blocks.0.moe.experts.w_down", range(8)))
    for size in (1, 2, 4):
        for first in range(0, 8, size):
            wanted = range(first, first + size)
            part = values(3, "blocks.0.moe.experts.w_down", wanted)
            assert torch.equal(part, whole[first : first + size])
    for one, two in itertools.combinations(whole, 2):
        assert not torch.isclose(one, two).any()


def test_seeds_and_names_draw_different_values():
    draws = [
        values(seed, f"blocks.{block}.moe.experts.w_down", range(2))
        for seed in (0, 1)
        for block in (0, 1)
    ]
    assert len({draw.numpy().tobytes() for draw in draws}) == 4
    first, other = (initialised(small_config(seed=seed)) for seed in (0, 1))
    for (name, one), two in zip(first.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two) == ("norm" in name), name


def test_building_takes_no_memory():
    model = build_model(small_config(model={"dim": 1 << 16, "layers": 8}), 1 << 17)
    assert {p.device.type for p in model.parameters()} == {"meta"}
