"""Conflicts between settings: each is refused with field, value and values that would do."""

from __future__ import annotations

import math
import re
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moetrain.build import build_model
from moetrain.cautions import cautions
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
from moetrain.constraints import check_world, problems, spell
from moetrain.errors import UserError
from moetrain.moe.router import RouterName

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
        "positions); try 1, 2, 4, 8 or 16, or set model.head_dim",
    ),
    "odd head": (
        {"model": {"dim": 12, "heads": 4}},
        "model.heads (4) must divide model.dim (12) into heads of even width (rotary "
        "positions); try 1, 2, 3 or 6, or set model.head_dim",
    ),
    "odd head_dim": (
        {"model": {"head_dim": 7}},
        "model.head_dim (7) must be even (rotary positions); try 6 or 8",
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
        "moe.experts (1) must be at least 2 for moe.router gshard; try 4 or 8",
    ),
    "hierarchical with one expert": (
        {"moe": {"router": "hierarchical", "experts": 1, "top_k": 1}},
        "moe.experts (1) must be at least 2 for moe.router hierarchical; try 4 or 8",
    ),
    "dense with some": (
        {"moe": {"router": "dense", "experts": 8, "top_k": 2}},
        "moe.top_k (2) must be 8 for moe.router dense; set moe.top_k to 8 or moe.router to topk",
    ),
    "hierarchical in one group": (
        {"moe": {"router": "hierarchical", "experts": 8}},
        "moe.expert_groups (1) must be at least 2 for moe.router hierarchical and divide "
        "moe.experts (8) into equal groups; try 2, 4 or 8",
    ),
    "unequal groups of experts": (
        {"moe": {"router": "sigmoid", "experts": 8, "expert_groups": 3}},
        "moe.expert_groups (3) must divide moe.experts (8) into equal groups; try 1, 2, 4 or 8",
    ),
    "unequal shares of choices": (
        {
            "moe": {
                "router": "sigmoid",
                "experts": 8,
                "expert_groups": 4,
                "top_k": 4,
                "top_groups": 3,
            }
        },
        "moe.top_groups (3) must divide moe.top_k (4) into equal shares that fit groups of 2 "
        "experts, and not exceed moe.expert_groups (4); try 2 or 4",
    ),
    "more choices than the open groups hold": (
        {"moe": {"router": "hierarchical", "experts": 8, "expert_groups": 4, "top_k": 5}},
        "moe.top_groups (1) must divide moe.top_k (5) into equal shares that fit groups of 2 "
        "experts, and not exceed moe.expert_groups (4); try moe.top_k 2, 3, 4, 6 or 8",
    ),
    "groups open that are not there": (
        {"moe": {"router": "sigmoid", "experts": 8, "top_groups": 2}},
        "moe.top_groups (2) must divide moe.top_k (2) into equal shares that fit groups of 8 "
        "experts, and not exceed moe.expert_groups (1); try 1",
    ),
    "expert_choice in a causal model": (
        {"moe": {"router": "expert_choice"}},
        "moe.router (expert_choice) lets a token's experts depend on later tokens, which a "
        "causal model must not see; set moe.allow_noncausal to true to train it all the same, "
        "or moe.router to topk",
    ),
    "expert_choice without a capacity in evaluation": (
        {"moe": {"router": "expert_choice", "allow_noncausal": True, "eval_capacity_factor": None}},
        "moe.eval_capacity_factor (null) cannot be dropless for moe.router expert_choice, where "
        "the capacity is how many tokens an expert takes; try 1.0",
    ),
    "autopilot where losers spill": (
        {"moe": {"capacity_factor": "auto", "drop_policy": "spill"}},
        "moe.capacity_factor (auto) goes by what each factor would have dropped, which with "
        "moe.drop_policy spill is not known without running it; set moe.drop_policy to position, "
        "or moe.capacity_factor to a number such as 1.25",
    ),
    "autopilot of expert_choice": (
        {"moe": {"capacity_factor": "auto", "router": "expert_choice", "allow_noncausal": True}},
        "moe.capacity_factor (auto) has nothing to go by with moe.router expert_choice, where the "
        "capacity is how many tokens an expert takes; try 1.0",
    ),
    "autopilot of a dense MoE": (
        {"moe": {"capacity_factor": "auto", "router": "dense", "top_k": 8}},
        "moe.capacity_factor (auto) has nothing to go by with moe.router dense, where every expert "
        "is asked by every token, so that 1.0 drops nothing; try 1.0",
    ),
    "spilling beyond the node limit": (
        {"moe": {"router": "sigmoid", "experts": 8, "expert_groups": 4, "drop_policy": "spill"}},
        "moe.drop_policy (spill) cannot act, because with moe.top_k (2) every expert open to a "
        "token is chosen already; set it to position",
    ),
    "priority among gates of 1": (
        {"moe": {"router": "topk", "top_k": 1, "drop_policy": "probability"}},
        "moe.drop_policy (probability) cannot act, because all gates of moe.router topk with "
        "moe.top_k (1) are equal; set it to position",
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
    assert {error["loc"][0] for error in refusal.value.errors()} == {field}


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_is_at_least_one(top_k):
    with pytest.raises(ValidationError) as refusal:
        MoEConfig(top_k=top_k)
    (error,) = refusal.value.errors()
    assert error["loc"] == ("top_k",)


@pytest.mark.parametrize("router", get_args(RouterName))
def test_top_k_never_exceeds_the_experts(router):
    moe = {"experts": 4, "top_k": 5, "router": router, "expert_groups": 2, "allow_noncausal": True}
    with pytest.raises(ValidationError, match=r"moe\.top_k \(5\)"):
        Config.model_validate({"moe": moe})


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
    assert (config.model.attention_head_dim, config.model.num_kv_heads) == (8, 8)
    assert (config.model.dense_ffn_dim, config.expert_ffn_dim) == (256, 256)
    config = Config(
        model=ModelConfig(dim=64, heads=8, kv_heads=2, ffn_dim=96), moe=MoEConfig(expert_ffn_dim=32)
    )
    assert config.model.num_kv_heads == 2
    assert Config(model=ModelConfig(dim=63, heads=5, head_dim=4)).model.attention_head_dim == 4
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
        "moe.renormalize (false) has no effect with moe.router switch; only topk and hierarchical "
        "read it",
    ),
    "min_capacity": (
        Config(moe=MoEConfig(capacity_factor=None, eval_capacity_factor=None, min_capacity=4)),
        "moe.min_capacity (4) has no effect when both capacity factors are null (dropless)",
    ),
    "target of a fixed factor": (
        Config(moe=MoEConfig(target_drop_rate=0.05)),
        "moe.target_drop_rate (0.05) has no effect with moe.capacity_factor 1.25; only auto reads "
        "it",
    ),
    "target without a capacity": (
        Config(moe=MoEConfig(capacity_factor=None, target_drop_rate=0.05)),
        "moe.target_drop_rate (0.05) has no effect with moe.capacity_factor null; only auto reads "
        "it",
    ),
    "autopilot of a dense model": (
        Config(moe=MoEConfig(experts=0, capacity_factor="auto")),
        "moe.capacity_factor (auto) has no effect when moe.experts is 0",
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
    "spike_response": (
        Config(train=TrainConfig(spike_sigmas=0, spike_response="stop")),
        "train.spike_response (stop) has no effect when train.spike_sigmas is 0: no step is a "
        "spike",
    ),
    "keep": (
        Config(checkpoint=CheckpointConfig(keep=5)),
        "checkpoint.keep (5) has no effect when checkpoint.every is 0 (never)",
    ),
    "trace of a dense model": (
        Config(moe=MoEConfig(experts=0), log=LogConfig(trace=True)),
        "log.trace (true) has no effect when moe.experts is 0: nothing is routed",
    ),
    "trace of no step": (
        Config(log=LogConfig(every=0, trace=True)),
        "log.trace (true) has no effect when log.every is 0 (never)",
    ),
    "wandb_project": (
        Config(log=LogConfig(wandb_project="x")),
        "log.wandb_project (x) has no effect when log.wandb is off",
    ),
    "artifacts without wandb": (
        Config(log=LogConfig(wandb_artifacts=True), checkpoint=CheckpointConfig(every=10)),
        "log.wandb_artifacts (true) has no effect when log.wandb is off",
    ),
    "artifacts without checkpoints": (
        Config(log=LogConfig(wandb="offline", wandb_artifacts=True)),
        "log.wandb_artifacts (true) has no effect when checkpoint.every is 0 (never)",
    ),
    "policy of evaluation alone": (
        Config(moe=MoEConfig(capacity_factor=None, drop_policy="random")),
        "moe.drop_policy (random) has no effect when moe.capacity_factor is null (dropless): "
        "outside training it is position",
    ),
    "spill_depth": (
        Config(moe=MoEConfig(spill_depth=2)),
        "moe.spill_depth (2) has no effect with moe.drop_policy position; only spill reads it",
    ),
    "spill_depth beyond the experts": (
        Config(moe=MoEConfig(experts=4, drop_policy="spill", spill_depth=3)),
        "moe.spill_depth (3) has no effect beyond the 2 experts that a token has not chosen",
    ),
    "spill_depth beyond the node limit": (
        Config(
            moe=MoEConfig(router="sigmoid", expert_groups=2, drop_policy="spill", spill_depth=3)
        ),
        "moe.spill_depth (3) has no effect beyond the 2 experts that a token has not chosen",
    ),
    "scope of no loss": (
        Config(moe=MoEConfig(balance_coef=0, balance_scope="batch")),
        "moe.balance_scope (batch) has no effect when moe.balance_coef is 0",
    ),
    "scope of a router that is even": (
        Config(moe=MoEConfig(router="balanced", balance_scope="batch")),
        "moe.balance_scope (batch) has no effect with moe.router balanced, which no loss can "
        "balance",
    ),
    "z-loss without weights": (
        Config(moe=MoEConfig(router="hash", z_loss_coef=0.1)),
        "moe.z_loss_coef (0.1) has no effect with moe.router hash, which has no weights",
    ),
    "shared_gate": (
        Config(moe=MoEConfig(shared_gate="softmax")),
        "moe.shared_gate (softmax) has no effect when moe.shared_experts is 0",
    ),
    "sigmoid that cannot learn": (
        Config(moe=MoEConfig(router="sigmoid", top_k=1)),
        "moe.top_k (1) makes every gate of moe.router sigmoid the same, so the router learns from "
        "the auxiliary losses alone; set moe.top_k to 2, or moe.router to switch",
    ),
    "groups that nothing chooses between": (
        Config(moe=MoEConfig(router="hierarchical", expert_groups=4)),
        "moe.renormalize (true) with moe.top_groups 1 and moe.top_k 2 makes every gate over groups "
        "1, so the router over groups learns from the auxiliary losses alone; set moe.renormalize "
        "to false",
    ),
    "one expert of each group": (
        Config(moe=MoEConfig(router="hierarchical", expert_groups=4, top_groups=2)),
        "moe.renormalize (true) with moe.top_groups 2 and moe.top_k 2 makes every gate inside a "
        "group 1, so the router inside a group learns from the auxiliary losses alone; set "
        "moe.renormalize to false",
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


# ---------------------------------------------------------------- routers × drop policies

FITTING = {  # what each router needs beside the defaults
    "switch": {"top_k": 1},
    "gshard": {},
    "topk": {},
    "noisy_topk": {},
    "sigmoid": {},
    "expert_choice": {"allow_noncausal": True, "eval_capacity_factor": 1.25},
    "hash": {},
    "random": {},
    "balanced": {},
    "dense": {"top_k": 8},
    "hierarchical": {"expert_groups": 2, "top_groups": 2, "top_k": 4},
}
DROPLESS = {"capacity_factor": None, "eval_capacity_factor": None}
POLICIES = get_args(MoEConfig.model_fields["drop_policy"].annotation)
NOTHING_DROPS = "moe.router expert_choice drops nothing"
EQUAL = "all gates of moe.router {} with moe.top_k (2) are equal"
ALL_CHOSEN = "with moe.top_k (8) every expert open to a token is chosen already"
REFUSED = {
    **{("expert_choice", policy): NOTHING_DROPS for policy in POLICIES if policy != "position"},
    **{(name, "probability"): EQUAL.format(name) for name in ("hash", "random", "balanced")},
    ("dense", "spill"): ALL_CHOSEN,
}


def test_the_table_names_every_router():
    assert FITTING.keys() == set(get_args(RouterName))
    assert set(get_args(MoEConfig.model_fields["router"].annotation)) == FITTING.keys()
    assert POLICIES == ("position", "probability", "random", "spill")


@pytest.mark.parametrize("dropless", [False, True], ids=["capacity", "dropless"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("router", FITTING)
def test_a_router_and_a_drop_policy_are_refused_or_build(router, policy, dropless):
    values = {"router": router, "drop_policy": policy, **FITTING[router]}
    values |= DROPLESS if dropless else {}
    reasons = [REFUSED[router, policy]] if (router, policy) in REFUSED else []
    if dropless and router == "expert_choice":
        reasons += ["moe.capacity_factor (null) cannot", "moe.eval_capacity_factor (null) cannot"]
    if reasons:
        with pytest.raises(ValidationError) as refusal:
            Config.model_validate({"moe": values})
        assert all(reason in str(refusal.value) for reason in reasons)
        assert len(refusal.value.errors()[0]["msg"].splitlines()) == len(reasons)
        return
    config = Config.model_validate({"moe": values})
    block = build_model(config, vocab_size=64).blocks[0]
    assert block.moe is not None
    assert (block.moe.gate.name, block.moe.drop_policy) == (router, policy)
    assert (block.moe.factors["train"] is None) == dropless
    without_effect = "has no effect when both capacity factors are null"
    expected = [f"moe.drop_policy ({policy}) {without_effect} (dropless)"]
    assert cautions(config) == (expected if dropless and policy != "position" else [])


OF_ROUTERS = {
    "jitter": (0.1, {"switch"}),
    "random_second": (False, {"gshard"}),
    "renormalize": (False, {"topk", "hierarchical"}),
    "gate_scale": (2.5, {"sigmoid"}),
    "bias_update_rate": (0.01, {"sigmoid"}),
    "expert_groups": (4, {"sigmoid", "hierarchical"}),
    "top_groups": (4, {"hierarchical"}),  # and sigmoid, with groups to choose from
    "allow_noncausal": (True, {"expert_choice"}),
}


@pytest.mark.parametrize("field", OF_ROUTERS)
@pytest.mark.parametrize("router", FITTING)
def test_a_setting_of_another_router_is_warned_of(router, field):
    value, readers = OF_ROUTERS[field]
    values = {"router": router, **FITTING[router], field: value}
    if field == "top_groups":
        values["expert_groups"] = 4
        readers = {*readers, "sigmoid"}
        values["top_k"] = 4 if router in readers else values.get("top_k", 2)
    found = cautions(Config.model_validate({"moe": values}))
    warned = [line for line in found if line.startswith(f"moe.{field} ")]
    assert len(warned) == (router not in readers)
    if warned:
        assert warned[0].startswith(f"moe.{field} ({spell(value)}) has no effect with moe.router")


USED = {
    "defaults": Config(),
    "jitter of switch": Config(moe=MoEConfig(router="switch", top_k=1, jitter=0.01)),
    "random_second of gshard": Config(moe=MoEConfig(router="gshard", random_second=False)),
    "renormalize of topk": Config(moe=MoEConfig(renormalize=False)),
    "scale and bias of sigmoid": Config(
        moe=MoEConfig(router="sigmoid", gate_scale=2.5, bias_update_rate=0.01, balance_coef=0)
    ),
    "node limit": Config(moe=MoEConfig(router="sigmoid", expert_groups=4, top_groups=2)),
    "two levels": Config(
        moe=MoEConfig(router="hierarchical", expert_groups=2, top_k=4, top_groups=2)
    ),
    "spill": Config(moe=MoEConfig(drop_policy="spill", spill_depth=6)),
    "probability of switch": Config(
        moe=MoEConfig(router="switch", top_k=1, drop_policy="probability")
    ),
    "target of the autopilot": Config(
        moe=MoEConfig(capacity_factor="auto", target_drop_rate=0.05, drop_policy="random")
    ),
    "whole batch": Config(moe=MoEConfig(balance_scope="batch")),
    "residual MoE": Config(moe=MoEConfig(shared_experts=1, shared_gate="softmax")),
    "min_capacity of evaluation": Config(moe=MoEConfig(capacity_factor=None, min_capacity=4)),
    "subset of a hub dataset": Config(data=DataConfig(source="owner/name", subset="en")),
    "decay_fraction of wsd": Config(train=TrainConfig(schedule="wsd", decay_fraction=0.5)),
    "spike_response": Config(train=TrainConfig(spike_response="stop")),
    "keep": Config(checkpoint=CheckpointConfig(every=10, keep=5)),
    "project of wandb": Config(log=LogConfig(wandb="offline", wandb_project="x")),
    "artifacts of wandb": Config(
        log=LogConfig(wandb="offline", wandb_artifacts=True), checkpoint=CheckpointConfig(every=10)
    ),
}


@pytest.mark.parametrize("config", USED.values(), ids=USED.keys())
def test_a_setting_with_effect_is_not_warned_of(config):
    assert cautions(config) == []


def test_experts_that_choose_more_in_evaluation_are_warned_of():
    (found,) = cautions(Config(moe=MoEConfig(router="expert_choice", allow_noncausal=True)))
    assert found.startswith("moe.eval_capacity_factor (2.0) gives a token another number of expe")
    assert "moe.capacity_factor (1.25)" in found


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
