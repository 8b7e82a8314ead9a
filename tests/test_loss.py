"""Cross-entropy in chunks against the whole, in value, gradients and memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import close
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.loss import IGNORED, cross_entropy_sum

TOKENS, DIM, VOCAB = 12, 5, 9


def inputs(tokens: int = TOKENS, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, DIM, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(VOCAB, DIM, generator=generator).to(dtype).requires_grad_()
    target_T = torch.randint(0, VOCAB, (tokens,), generator=generator)
    return hidden_TD, weight_VD, target_T


@settings(max_examples=40, deadline=None)
@given(st.integers(1, TOKENS + 2), st.sets(st.integers(0, TOKENS - 1)))
def test_any_chunk_size_gives_value_and_gradients_of_the_whole(chunk, ignored):
    hidden_TD, weight_VD, target_T = inputs()
    target_T[list(ignored)] = IGNORED
    loss = cross_entropy_sum(hidden_TD, weight_VD, target_T, chunk)
    whole = F.cross_entropy(
        F.linear(hidden_TD, weight_VD), target_T, ignore_index=IGNORED, reduction="sum"
    )
    close(loss, whole)
    leaves = [hidden_TD, weight_VD]
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * whole, leaves), strict=True
    ):
        close(ours, theirs)


def test_a_loss_by_hand():
    # Logits (0, ln 3) say 1/4 and 3/4; (0, 0) says 1/2 each. The third token has no target.
    hidden_TD = torch.tensor([[1.0], [0.0], [7.0]], dtype=torch.float64)
    weight_VD = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    loss = cross_entropy_sum(hidden_TD, weight_VD, torch.tensor([1, 0, IGNORED]))
    close(loss, math.log(8 / 3))


@pytest.mark.parametrize("chunk", [5, TOKENS])
def test_all_ignored_is_zero_with_zero_gradients(chunk):
    hidden_TD, weight_VD, target_T = inputs()
    loss = cross_entropy_sum(hidden_TD, weight_VD, target_T.fill_(IGNORED), chunk)
    loss.backward()
    assert loss == 0
    assert hidden_TD.grad.eq(0).all()
    assert weight_VD.grad.eq(0).all()


def test_the_softmax_of_bf16_logits_is_taken_in_fp32():
    hidden_TD, weight_VD, target_T = inputs(dtype=torch.bfloat16)
    loss = cross_entropy_sum(hidden_TD, weight_VD, target_T)
    assert loss.dtype == torch.float32
    logits_TV = F.linear(hidden_TD, weight_VD).double()
    torch.testing.assert_close(
        loss.double(), F.cross_entropy(logits_TV, target_T, reduction="sum"), rtol=1e-6, atol=0
    )


class Largest(TorchDispatchMode):
    """Watches the size of every tensor that an operation makes, in the backward pass too."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def test_logits_of_all_tokens_never_exist():
    tokens, chunk = 64 * TOKENS, 8
    hidden_TD, weight_VD, target_T = inputs(tokens)
    with Largest() as watch:
        cross_entropy_sum(hidden_TD, weight_VD, target_T, chunk).backward()
    assert watch.numel == tokens * DIM < tokens * VOCAB
    with Largest() as watch:
        cross_entropy_sum(hidden_TD, weight_VD, target_T, tokens).backward()
    assert watch.numel == tokens * VOCAB  # the watch sees logits where there are some


class Living(TorchDispatchMode):
    """Watches how many tensors of one size live together when one more is made."""

    def __init__(self, numel: int):
        super().__init__()
        self._numel, self._seen, self.most = numel, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.numel() == self._numel:
            self._seen.append(StorageWeakRef(made.untyped_storage()))
            self.most = max(self.most, len({ref.cdata for ref in self._seen if not ref.expired()}))
        return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_of_a_chunk_are_gone_before_those_of_the_next(dtype):
    hidden_TD, weight_VD, target_T = inputs(4 * TOKENS, dtype)
    most = []
    for tokens in (TOKENS, 4 * TOKENS):
        with Living(TOKENS * VOCAB) as watch:
            cross_entropy_sum(hidden_TD[:tokens], weight_VD, target_T[:tokens], TOKENS)
        most.append(watch.most)
    assert most[0] == most[1] > 0


def test_gradients_alone_are_kept_for_the_backward_pass():
    tokens = 64 * TOKENS
    hidden_TD, weight_VD, target_T = inputs(tokens)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        cross_entropy_sum(hidden_TD, weight_VD, target_T, chunk_tokens=8)
    assert [tensor.shape for tensor in kept] == [hidden_TD.shape, weight_VD.shape]


class Products(TorchDispatchMode):
    """Counts matrix products."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_no_gradient_is_computed_where_none_is_wanted():
    hidden_TD, weight_VD, target_T = inputs()
    with Products() as with_gradients:
        loss = cross_entropy_sum(hidden_TD, weight_VD, target_T, chunk_tokens=4)
    with torch.no_grad(), Products() as without:
        close(cross_entropy_sum(hidden_TD, weight_VD, target_T, chunk_tokens=4), loss)
    assert (without.number, with_gradients.number) == (TOKENS // 4, 3 * TOKENS // 4)


def test_gradients_in_bf16_are_scaled_by_an_unrounded_factor():
    hidden_TD, weight_VD, target_T = inputs(dtype=torch.bfloat16)
    leaves, factor = [hidden_TD, weight_VD], 1 + 2**-8 - 2**-20  # rounded to bf16 it is 1
    loss = cross_entropy_sum(hidden_TD, weight_VD, target_T)
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(torch.tensor(factor) * loss, leaves)
    for one, other in zip(plain, scaled, strict=True):
        assert torch.equal(other, (factor * one.double()).to(torch.bfloat16))
        assert not torch.equal(other, one)


def test_parts_of_the_weights_gradient_are_not_added_up_in_bf16():
    tokens = 1024 * TOKENS
    hidden_TD, weight_VD, target_T = inputs(tokens, torch.bfloat16)
    in_parts, whole = (
        torch.autograd.grad(cross_entropy_sum(hidden_TD, weight_VD, target_T, chunk), weight_VD)[0]
        for chunk in (8, tokens)
    )
    torch.testing.assert_close(in_parts, whole, rtol=1e-2, atol=0.5)
