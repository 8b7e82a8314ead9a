"""Conflicts between settings: each is refused with field, value and values that would do."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moetrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    TrainConfig,
)
from moetrain.constraints import cautions, check_world, problems, spell
from moetrain.errors import UserError

WIDE = (
    "must be 1 to 128 letters, digits, '.', '_' or '-', and neither '.' nor '..', because it "
    "names a folder inside out; try "
)

CONFLICTS = {
    "experts over ep": (
        {"moe": {"experts": 63}, "parallel": {"ep": 8}},
        "moe.experts (63) must be divisible by parallel.ep (8); "
        "try 56 or 64, or parallel.ep 1, 3, 7, 9 or 21",
    ),
    "fewer experts than ep": (
        {"moe": {"experts": 2}, "parallel": {"ep": 4}},
        "moe.experts (2) must be divisible by parallel.ep (4); try 4, or parallel.ep 1 or 2",
    ),
    "ep without experts": (
        {"moe": {"experts": 0}, "parallel": {"ep": 4}},
        "parallel.ep (4) needs experts to share, but moe.experts is 0; set parallel.ep to 1",
    ),
    "heads over dim": (
        {"model": {"dim": 256, "heads": 3}},
        "model.heads (3) must divide model.dim (256) into heads of even width (rotary "
        "positions); try 1, 2, 4, 8 or 16",
    ),
    "odd head": (
        {"model": {"dim": 12, "heads": 4}},
        "model.heads (4) must divide model.dim (12) into heads of even width (rotary "
        "positions); try 1, 2, 3 or 6",
    ),
    "odd dim": (
        {"model": {"dim": 255, "heads": 5}},
        "model.dim (255) must be even (rotary positions); try 254 or 256",
    ),
    "kv heads over heads": (
        {"model": {"heads": 4, "kv_heads": 3}},
        "model.kv_heads (3) must divide model.heads (4); try 1, 2 or 4",
    ),
    "more kv heads than heads": (
        {"model": {"heads": 4, "kv_heads": 8}},
        "model.kv_heads (8) must divide model.heads (4); try 1, 2 or 4",
    ),
    "top_k over experts": (
        {"moe": {"experts": 8, "top_k": 9}},
        "moe.top_k (9) must not exceed moe.experts (8); try 1 to 8",
    ),
    "top_k over one expert": (
        {"moe": {"experts": 1, "top_k": 2}},
        "moe.top_k (2) must not exceed moe.experts (1); try 1",
    ),
    "switch with two": (
        {"moe": {"router": "switch", "top_k": 2}},
        "moe.top_k (2) must be 1 for moe.router switch; set moe.top_k to 1 or moe.router to topk",
    ),
    "gshard with one": (
        {"moe": {"router": "gshard", "top_k": 1}},
        "moe.top_k (1) must be 2 for moe.router gshard; set moe.top_k to 2 or moe.router to topk",
    ),
    "gshard with one expert": (
        {"moe": {"router": "gshard", "experts": 1}},
        "moe.experts (1) must be at least 2 for moe.router gshard; try 2 or 4",
    ),
    "group over sequence": (
        {"moe": {"group": 100}},
        "moe.group (100) must divide data.seq_len (256); "
        "try 8, 16, 32, 64 or 128, sequence or microbatch",
    ),
    "first_dense leaves no layer": (
        {"moe": {"first_dense": 4}},
        "moe.every (1) and moe.first_dense (4) leave none of model.layers (4) for experts; "
        "try moe.every 1 and moe.first_dense 0, or moe.experts 0 for a dense model",
    ),
    "every leaves no layer": (
        {"moe": {"every": 5}},
        "moe.every (5) and moe.first_dense (0) leave none of model.layers (4) for experts; "
        "try moe.every 1 and moe.first_dense 0, or moe.experts 0 for a dense model",
    ),
    "name above out": ({"name": "../x"}, f"name (../x) {WIDE}x"),
    "absolute name": ({"name": "/etc/x"}, f"name (/etc/x) {WIDE}etc-x"),
    "name is parent": ({"name": ".."}, f"name (..) {WIDE}run"),
    "name is here": ({"name": "."}, f"name (.) {WIDE}run"),
    "empty name": ({"name": ""}, f"name () {WIDE}run"),
    "name with newline": ({"name": "a\n"}, f"name (a\n) {WIDE}a"),
}


@pytest.mark.parametrize(("values", "message"), CONFLICTS.values(), ids=CONFLICTS.keys())
def test_a_conflict_is_refused_with_legal_values(values, message):
    with pytest.raises(ValidationError) as refusal:
        Config.model_validate(values)
    (error,) = refusal.value.errors()
    assert error["msg"] == f"Value error, {message}"


def test_every_conflict_is_reported_at_once():
    with pytest.raises(ValidationError) as refusal:
        Config.model_validate(
            {
                "name": "..",
                "model": {"kv_heads": 3},
                "moe": {"experts": 63, "group": 7},
                "parallel": {"ep": 8},
            }
        )
    (error,) = refusal.value.errors()
    lines = error["msg"].removeprefix("Value error, ").splitlines()
    assert [line.split(" ")[0] for line in lines] == [
        "name",
        "model.kv_heads",
        "moe.experts",
        "moe.group",
    ]


@pytest.mark.parametrize("factor", [0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["capacity_factor", "eval_capacity_factor"])
def test_a_capacity_factor_is_positive_and_finite(field, factor):
    with pytest.raises(ValidationError) as refusal:
        MoEConfig.model_validate({field: factor})
    (error,) = refusal.value.errors()
    assert error["loc"] == (field,)


def test_null_capacity_factor_is_dropless():
    assert MoEConfig(capacity_factor=None).capacity_factor is None


def test_a_dense_model_asks_nothing_of_the_experts():
    config = Config(moe=MoEConfig(experts=0, top_k=3, group=7, first_dense=9))
    assert config.moe.block_indices(4) == ()


@pytest.mark.parametrize(
    ("every", "first_dense", "blocks"),
    [(1, 0, (0, 1, 2, 3)), (2, 0, (1, 3)), (1, 1, (1, 2, 3)), (2, 2, (3,)), (3, 0, (2,))],
)
def test_which_blocks_hold_experts(every, first_dense, blocks):
    assert MoEConfig(every=every, first_dense=first_dense).block_indices(4) == blocks


def test_null_widths_are_resolved():
    config = Config(model=ModelConfig(dim=64, heads=8))
    assert (config.model.head_dim, config.model.num_kv_heads) == (8, 8)
    assert (config.model.dense_ffn_dim, config.expert_ffn_dim) == (256, 256)
    config = Config(
        model=ModelConfig(dim=64, heads=8, kv_heads=2, ffn_dim=96), moe=MoEConfig(expert_ffn_dim=32)
    )
    assert config.model.num_kv_heads == 2
    assert (config.model.dense_ffn_dim, config.expert_ffn_dim) == (96, 32)


WORLDS = {
    "replicas over world": (
        {"parallel": {"dp_replicate": 3}, "train": {"micro_batch": 4}},
        8,
        ["parallel.dp_replicate (3) must divide the world size (8); try 1, 2, 4 or 8"],
    ),
    "ep over dp_shard": (
        {"parallel": {"ep": 8, "dp_replicate": 2}, "train": {"micro_batch": 4}},
        8,
        [
            "parallel.ep (8) must divide dp_shard (4 = world size 8 / parallel.dp_replicate 2); "
            "try 1, 2 or 4, or a world size of 16"
        ],
    ),
    "ep that the experts forbid is not proposed": (
        {"moe": {"experts": 6}, "parallel": {"ep": 3}, "train": {"micro_batch": 4}},
        8,
        [
            "parallel.ep (3) must divide dp_shard (8 = world size 8 / parallel.dp_replicate 1); "
            "try 1 or 2, or a world size of 6 or 9"
        ],
    ),
    "batch over world": (
        {"model": {"dim": 96}},
        3,
        ["train.global_batch (32) must be divisible by the world size (3); try 30 or 33"],
    ),
    "batch over micro-batch": (
        {"train": {"micro_batch": 5}},
        2,
        [
            "train.global_batch (32) must be train.micro_batch (5) × world size (2) × a whole "
            "number of accumulation steps; try train.micro_batch 1, 2, 4, 8 or 16"
        ],
    ),
    "micro-batch beyond the batch": (
        {"train": {"global_batch": 4}},
        1,
        [
            "train.global_batch (4) must be train.micro_batch (8) × world size (1) × a whole "
            "number of accumulation steps; try train.micro_batch 1, 2 or 4"
        ],
    ),
    "experts' rows over the ranks that share them": (
        {"model": {"dim": 264}, "moe": {"expert_ffn_dim": 60}, "train": {"micro_batch": 4}},
        8,
        [
            "model.dim (264) and the width of an expert (60) must be divisible by the number of "
            "ranks that hold the same experts (8 = dp_shard 8 / parallel.ep 1); try another world "
            "size, or parallel.ep 2, 4 or 8"
        ],
    ),
    "two at once": (
        {"parallel": {"ep": 2}},
        5,
        [
            "parallel.ep (2) must divide dp_shard (5 = world size 5 / parallel.dp_replicate 1); "
            "try 1, or a world size of 4 or 6",
            "train.global_batch (32) must be divisible by the world size (5); try 30 or 35",
        ],
    ),
    "no rank": ({}, 0, ["world size (0) must be at least 1"]),
}


@pytest.mark.parametrize(("values", "world_size", "lines"), WORLDS.values(), ids=WORLDS.keys())
def test_a_world_that_does_not_fit_is_refused(values, world_size, lines):
    with pytest.raises(UserError) as refusal:
        check_world(Config.model_validate(values), world_size)
    assert str(refusal.value).splitlines() == lines


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_a_world_is_accepted_exactly_when_every_product_comes_out(world, ep, replicas, micro):
    config = Config(
        model=ModelConfig(dim=840, heads=4),
        moe=MoEConfig(experts=840, expert_ffn_dim=1260),
        parallel=ParallelConfig(ep=ep, dp_replicate=replicas),
        train=TrainConfig(global_batch=96, micro_batch=micro),
    )
    fits = any(
        replicas * edp * ep == world and 840 % edp == 0 and 1260 % edp == 0 for edp in range(1, 65)
    )
    fits &= any(micro * world * steps == 96 for steps in range(1, 97))
    if not fits:
        with pytest.raises(UserError):
            check_world(config, world)
        return
    check_world(config, world)
    assert config.dp_shard(world) * replicas == world
    assert config.accumulation(world) * micro * world == 96


@given(st.integers(1, 300), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_the_experts_proposed_are_legal(experts, ep):
    config = Config.model_construct(
        moe=MoEConfig(experts=experts, top_k=1), parallel=ParallelConfig(ep=ep)
    )
    found = problems(config)
    assert bool(found) == (experts % ep != 0)
    for line in found:
        proposed, degrees = line.split("; try ")[1].split(", or parallel.ep ")
        assert all(int(number) % ep == 0 for number in proposed.split(" or "))
        degrees = degrees.replace(" or ", ", ").split(", ")
        assert all(experts % int(degree) == 0 for degree in degrees)


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_a_refused_name_comes_with_a_legal_one(name):
    refused = problems(Config.model_construct(name=name))
    legal = re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name) is not None and name not in (".", "..")
    assert bool(refused) != legal
    for line in refused:
        assert problems(Config.model_construct(name=line.rsplit("; try ", 1)[1])) == []


IDLE = {
    "jitter": (
        Config(moe=MoEConfig(jitter=0.01)),
        "moe.jitter (0.01) has no effect with moe.router topk; only switch reads it",
    ),
    "random_second": (
        Config(moe=MoEConfig(random_second=False)),
        "moe.random_second (false) has no effect with moe.router topk; only gshard reads it",
    ),
    "renormalize": (
        Config(moe=MoEConfig(router="switch", top_k=1, renormalize=False)),
        "moe.renormalize (false) has no effect with moe.router switch; only topk reads it",
    ),
    "min_capacity": (
        Config(moe=MoEConfig(capacity_factor=None, eval_capacity_factor=None, min_capacity=4)),
        "moe.min_capacity (4) has no effect when both capacity factors are null (dropless)",
    ),
    "dense": (
        Config(moe=MoEConfig(experts=0, capacity_factor=None)),
        "moe.capacity_factor (null) has no effect when moe.experts is 0",
    ),
    "subset": (
        Config(data=DataConfig(subset="en")),
        "data.subset (en) has no effect for the local data.source stdlib",
    ),
    "field": (
        Config(data=DataConfig(field="content")),
        "data.field (content) has no effect for data.source stdlib",
    ),
    "decay_fraction": (
        Config(train=TrainConfig(decay_fraction=0.5)),
        "train.decay_fraction (0.5) has no effect with train.schedule cosine",
    ),
    "keep": (
        Config(checkpoint=CheckpointConfig(keep=5)),
        "checkpoint.keep (5) has no effect when checkpoint.every is 0 (never)",
    ),
    "wandb_project": (
        Config(log=LogConfig(wandb_project="x")),
        "log.wandb_project (x) has no effect when log.wandb is off",
    ),
    "router that cannot learn": (
        Config(moe=MoEConfig(top_k=1)),
        "moe.renormalize (true) with moe.top_k 1 makes every gate 1, so the router learns from "
        "the auxiliary losses alone; set moe.renormalize to false",
    ),
    "warm-up all along": (
        Config(train=TrainConfig(steps=20)),
        "train.warmup_steps (20) lasts for all train.steps (20), so the learning rate never "
        "falls again",
    ),
}


@pytest.mark.parametrize(("config", "warning"), IDLE.values(), ids=IDLE.keys())
def test_a_setting_without_effect_is_named(config, warning):
    assert cautions(config) == [warning]


USED = {
    "defaults": Config(),
    "jitter of switch": Config(moe=MoEConfig(router="switch", top_k=1, jitter=0.01)),
    "random_second of gshard": Config(moe=MoEConfig(router="gshard", random_second=False)),
    "renormalize of topk": Config(moe=MoEConfig(renormalize=False)),
    "min_capacity of evaluation": Config(moe=MoEConfig(capacity_factor=None, min_capacity=4)),
    "subset of a hub dataset": Config(data=DataConfig(source="owner/name", subset="en")),
    "decay_fraction of wsd": Config(train=TrainConfig(schedule="wsd", decay_fraction=0.5)),
    "keep": Config(checkpoint=CheckpointConfig(every=10, keep=5)),
    "project of wandb": Config(log=LogConfig(wandb="offline", wandb_project="x")),
}


@pytest.mark.parametrize("config", USED.values(), ids=USED.keys())
def test_a_setting_with_effect_is_not_warned_of(config):
    assert cautions(config) == []


def test_a_folder_is_a_local_source(tmp_path):
    config = Config(data=DataConfig(source=str(tmp_path), split="test", streaming=True))
    assert cautions(config) == [
        f"data.split (test) has no effect for the local data.source {tmp_path}",
        f"data.streaming (true) has no effect for the local data.source {tmp_path}",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "null"), (True, "true"), (0.5, "0.5"), ("a", "a"), (1, "1")]
)
def test_values_are_spelled_as_in_yaml(value, text):
    assert spell(value) == text


def test_every_setting_is_described():
    undescribed = [
        f"{section}.{name}"
        for section, field in Config.model_fields.items()
        if hasattr(field.annotation, "model_fields")
        for name, setting in field.annotation.model_fields.items()
        if not setting.description
    ]
    assert undescribed == []
