"""Parameters and FLOPs against formulas worked out by hand, and figures that are published."""

from __future__ import annotations

import re

import pytest
from models import initialised, small_config

from moetrain.build import build_model
from moetrain.config import Config
from moetrain.errors import UserError
from moetrain.sizes import Sizes, sizes, train_flops_per_token

# dim 16, 4 heads, 2 of them for keys and values: q and out 16·16, k and v 16·8 each.
ATTENTION = 2 * 16 * 16 + 2 * 16 * 8
NORMS = 2 * 16
DENSE = 3 * 16 * 24
EXPERT = 3 * 16 * 12
ROUTER = 4 * 16
MODEL = {"kv_heads": 2}


def of(vocab_size: int = 50, **sections) -> Sizes:
    return sizes(build_model(small_config(**sections), vocab_size))


def test_dense_by_hand():
    counted = of(model=MODEL, moe={"experts": 0})
    total = 2 * (ATTENTION + NORMS + DENSE) + 16 + 50 * 16
    assert counted == Sizes(total, total, 50 * 16)


def test_untied_embeddings_count_twice_and_qk_norm_once_per_block():
    tied, untied = (of(model={"tie_embeddings": tie}) for tie in (True, False))
    assert untied.total - tied.total == untied.active - tied.active == 50 * 16
    assert of(model={"qk_norm": "head"}).total - tied.total == 2 * 2 * 4
    full = of(model={"qk_norm": "full", **MODEL})  # 4 heads for queries, 2 for keys
    assert full.total - of(model=MODEL).total == 2 * (4 + 2) * 4


@pytest.mark.parametrize(
    ("router", "top_k"), [("switch", 1), ("topk", 3), ("topk", 4), ("sigmoid", 2), ("dense", 4)]
)
def test_experts_by_hand(router, top_k):
    counted = of(
        model=MODEL,
        moe={"router": router, "top_k": top_k, "shared_experts": 2, "first_dense": 1},
    )
    outside = 2 * (ATTENTION + NORMS) + DENSE + ROUTER + 2 * EXPERT + 16 + 50 * 16
    assert counted == Sizes(outside + 4 * EXPERT, outside + top_k * EXPERT, 50 * 16)


def test_counts_are_those_of_a_model_with_memory():
    config = small_config(moe={"shared_experts": 1}, model={"tie_embeddings": False})
    model = initialised(config)
    assert sizes(model) == sizes(build_model(config, model.embedding.num_embeddings))
    assert sizes(model).total == sum(p.numel() for p in model.parameters())


def published(vocab_size: int, model: dict, moe: dict) -> Sizes:
    config = Config.model_validate({"model": {"tie_embeddings": False, **model}, "moe": moe})
    return sizes(build_model(config, vocab_size))


def test_the_shape_of_mixtral_8x7b_has_its_published_size():
    counted = published(
        32_000,
        {"dim": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ffn_dim": 14_336},
        {"experts": 8, "top_k": 2},
    )
    assert counted.total == 46_702_792_704  # "46.7B", 2401.04088
    assert counted.active == 12_879_925_248  # "12.9B"


def test_the_shape_of_olmoe_has_its_published_size():
    counted = published(
        50_304,
        {"dim": 2048, "layers": 16, "heads": 16, "qk_norm": "full"},
        {"experts": 64, "top_k": 8, "expert_ffn_dim": 1024, "renormalize": False},
    )
    assert round(counted.total / 1e9, 1) == 6.9  # "6.9B", 2409.02060
    assert round(counted.active / 1e9, 1) == 1.3


def test_a_padded_vocabulary_has_more_rows_and_cannot_have_fewer():
    assert of(model={"vocab_size": 64}).embedding == 64 * 16
    assert of(model={"vocab_size": 50}) == of()
    message = (
        "model.vocab_size (49) must be at least the 50 ids of data.tokenizer (bytes); try 50, "
        "128 (a multiple of 128) or null"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        of(model={"vocab_size": 49})


def test_heads_of_another_width():
    counted = of(model={"head_dim": 6})  # not the 4 of dim/heads
    assert counted.total - of().total == 2 * 4 * (16 * 4 * 2)
    wide = train_flops_per_token(build_model(small_config(model={"head_dim": 6}), 50), seq_len=8)
    narrow = train_flops_per_token(build_model(small_config(), 50), seq_len=8)
    assert wide - narrow == 6 * 2 * 4 * (16 * 4 * 2) + 12 * 2 * 4 * 2 * 8


@pytest.mark.parametrize("tie", [True, False])
def test_flops_by_hand(tie):
    model = build_model(small_config(model={**MODEL, "tie_embeddings": tie}), 50)
    # The output projection multiplies, the look-up does not: tied or not, 50·16 counts once.
    multiplied = 2 * (ATTENTION + NORMS + ROUTER + 2 * EXPERT) + 16 + 50 * 16
    flops = train_flops_per_token(model, seq_len=8)
    assert flops == 6 * multiplied + 12 * 2 * 16 * 8
