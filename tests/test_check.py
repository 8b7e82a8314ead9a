"""The report before a run: its numbers by hand, and against the model and a pass that are real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import SMALL

from moetrain import check, settings
from moetrain.build import build_model
from moetrain.config import Config
from moetrain.data import tokenizer
from moetrain.mesh import Mesh
from moetrain.sizes import sizes
from moetrain.testing import simulate_ranks

VOCAB = 257  # of the bytes tokenizer


def config(**sections) -> Config:
    merged = {
        name: {**SMALL.get(name, {}), **sections.get(name, {})}
        for name in SMALL.keys() | sections.keys()
    }
    merged["train"] = {"global_batch": 16, "micro_batch": 2, **merged.get("train", {})}
    return settings.resolve(None, merged)


def test_mesh_and_step_by_hand():
    made = config(parallel={"ep": 2, "dp_replicate": 2}, data={"seq_len": 32})
    text = check.report(made, 8)
    assert "8 ranks = dp_replicate 2 × dp_shard 4" in text
    assert "dp_shard 4 = edp 2 × ep 2: 2 of 4 experts per rank" in text
    assert "512 tokens = 8 ranks × 1 micro-batches × 2 sequences × 32 tokens" in text
    assert "200 steps, 102,400 tokens in the run" in text


def test_who_holds_what_by_hand():
    text = check.report(config(parallel={"ep": 2, "dp_replicate": 2}), 8)
    assert "all_to_all among ranks 0-1, 2-3, 4-5, 6-7\n" in text
    assert "experts 0-1 on ranks 0, 2, 4, 6\n" in text
    assert "experts 2-3 on ranks 1, 3, 5, 7\n" in text
    text = check.report(config(moe={"experts": 64}, parallel={"ep": 16}), 128)
    assert "all_to_all among ranks 0-15, 16-31, …, 112-127\n" in text
    lines = re.findall(r"^ +(experts .*|…)$", text, re.MULTILINE)
    assert lines == [
        "experts 0-3 on ranks 0, 16, …, 112",
        "experts 4-7 on ranks 1, 17, …, 113",
        "…",
        "experts 60-63 on ranks 15, 31, …, 127",
    ]
    text = check.report(config(), 2)
    assert "all_to_all" not in text
    assert "experts 0-3 on ranks 0-1\n" in text


def groups_of_a_mesh(ep: int, dp_replicate: int) -> list[list[int]]:
    mesh = Mesh(torch.device("cpu"), ep, dp_replicate)
    same = mesh.same_experts.mesh if dp_replicate == 1 else mesh.same_experts._flatten().mesh
    return [dist.get_process_group_ranks(mesh.expert_parallel.get_group()), same.tolist()]


@pytest.mark.parametrize(("ep", "dp_replicate"), [(1, 1), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_groups_are_those_of_the_mesh(ep, dp_replicate):
    for rank, (group, same) in enumerate(simulate_ranks(8, groups_of_a_mesh, ep, dp_replicate)):
        assert range(group[0], group[-1] + 1) == check.expert_groups(8, ep)[rank // ep]
        assert same == list(check.holders(8, ep)[rank % ep])


def test_parameters_by_hand():
    # Attention 4·16², a dense layer 3·16·24, an expert 3·16·12; two norms, a router 4·16.
    outside = 4 * 256 + 32
    dense, sparse = outside + 1152, outside + 64 + 4 * 576
    active = sparse - 2 * 576
    text = check.report(config(moe={"first_dense": 1}), 1)
    assert re.search(rf" 0 +dense +{dense:,} +{dense:,}\n", text)
    kind = "topk, 2 of 4 experts, drop policy position"
    assert re.search(rf" 1 +{kind} +{sparse:,} +{active:,}\n", text)
    total = dense + sparse + 16 + 257 * 16
    assert f"{total:,} in total, {total - 2 * 576:,} active per token" in text
    flops = 6 * (total - 2 * 576) + 12 * 2 * 16 * 8
    assert f"{flops / 1e9:.4g} GFLOP per token" in text


def test_equal_blocks_share_a_line():
    def blocks(layers: int = 5, **moe) -> list[tuple[str, str]]:
        text = check.report(config(model={"layers": layers}, moe=moe), 1)
        return re.findall(r"^ {11}(\d.*?) +(dense|topk)", text, re.MULTILINE)

    assert blocks() == [("0-4", "topk")]
    assert blocks(first_dense=2) == [("0-1", "dense"), ("2-4", "topk")]
    assert blocks(first_dense=3, every=2) == [("0-2, 4", "dense"), ("3", "topk")]
    assert blocks(every=2, layers=10) == [("0, 2, …, 8", "dense"), ("1, 3, …, 9", "topk")]


def test_the_quickstart_by_hand():
    made = settings.load(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
    text = check.report(made, 2)
    attention, norms, router, expert = 4 * 192**2, 2 * 192, 8 * 192, 3 * 192 * 384
    outside = 4 * (attention + norms + router) + 192 + 257 * 192
    total, active = outside + 4 * 8 * expert, outside + 4 * 2 * expert
    assert f"{total:,} in total, {active:,} active per token" in text
    assert "dp_shard 2 = edp 1 × ep 2: 4 of 8 experts per rank" in text
    assert "training: 80 slots per expert and group" in text  # 1.25·2·256/8
    assert "4,096 tokens = 2 ranks × 1 micro-batches × 8 sequences × 256 tokens" in text


def test_shared_experts_are_named_and_counted():
    for kind, of_gate in (("none", 0), ("sigmoid", 16), ("softmax", 32)):
        text = check.report(config(moe={"shared_experts": 2, "shared_gate": kind}), 1)
        sparse = 4 * 256 + 32 + 64 + 6 * 576 + of_gate
        shared = r"\+ shared" + (rf" \({kind}\)" if of_gate else "")
        assert re.search(rf"position {shared} +{sparse:,} +{sparse - 2 * 576:,}\n", text)


# Every gate: settings, parameters of its router, and experts that a token passes.
GATES = {
    "switch": ({"top_k": 1, "jitter": 0.1}, 64, 1),
    "gshard": ({}, 64, 2),
    "topk": ({}, 64, 2),
    "noisy_topk": ({}, 128, 2),
    "sigmoid": ({"expert_groups": 2}, 64, 2),
    "expert_choice": ({"allow_noncausal": True}, 64, 2),
    "hash": ({}, 0, 2),
    "random": ({}, 0, 2),
    "balanced": ({}, 0, 2),
    "dense": ({"top_k": 4}, 64, 4),
    "hierarchical": ({"expert_groups": 2, "top_groups": 2}, 64 + 32, 2),
}


@pytest.mark.parametrize("router", GATES)
def test_every_gate_by_hand(router):
    options, of_router, top_k = GATES[router]
    sparse = 4 * 256 + 32 + of_router + 4 * 576
    text = check.report(config(moe={"router": router, **options}), 1)
    kind = f"{router}, {top_k} of 4 experts"
    if router != "expert_choice":
        kind += ", drop policy position"
        assert f"groups of 8 tokens, {top_k} of 4 experts for each" in text
    else:
        assert "groups of 8 tokens, whose slots the 4 experts fill by themselves" in text
    assert re.search(rf" {kind} +{sparse:,} +{sparse - (4 - top_k) * 576:,}\n", text)


def test_a_dropless_layer_has_no_drop_policy():
    dropless = {"capacity_factor": None, "eval_capacity_factor": None, "drop_policy": "spill"}
    assert "drop policy" not in check.report(config(moe=dropless), 1)
    dropless["eval_capacity_factor"] = 1.0
    assert "2 of 4 experts, drop policy spill " in check.report(config(moe=dropless), 1)


@pytest.mark.parametrize(
    ("moe", "lines"),
    [
        # 1.25·2·8/4 = 5 slots and 2·2·8/4 = 8; rounded up, 1.1 becomes 5·4/(2·8).
        ({"capacity_factor": 1.25}, ["training: 5 slots", "factor 1.25 (effective 1.25)"]),
        ({"capacity_factor": 1.1}, ["training: 5 slots", "factor 1.1 (effective 1.25)"]),
        ({"eval_capacity_factor": 2.0}, ["evaluation: 8 slots", "factor 2.0 (effective 2)"]),
        ({"capacity_factor": 9.0}, ["training: 8 slots", "factor 9.0 (effective 2)"]),
        ({"group": 4}, ["groups of 4 tokens", "training: 3 slots", "(effective 1.5)"]),
        ({"group": "microbatch"}, ["groups of 16 tokens", "training: 10 slots"]),
        ({"capacity_factor": None}, ["training: dropless"]),
        # 4.0 would be 16 slots for 8 tokens
        (
            {"capacity_factor": "auto"},
            [
                "training: 8 slots",
                "factor 4.0 (effective 2)",
                "auto: training may go down to 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, "
                "2.0, 3.0; all below is for 4.0",
            ],
        ),
        ({"eval_capacity_factor": None}, ["evaluation: dropless"]),
    ],
)
def test_slots_by_hand(moe, lines):
    text = check.report(config(moe=moe), 1)
    for line in lines:
        assert line in text


def test_a_dense_model_has_no_routing():
    text = check.report(config(moe={"experts": 0}), 1)
    assert "routing" not in text
    assert "experts" not in text
    counted = sizes(build_model(config(moe={"experts": 0}), VOCAB))
    assert f"{counted.total:,} in total, {counted.total:,} active" in text


def test_the_vocabulary_is_the_tokenizers():
    with pytest.raises(ValueError, match="there is no file"):
        check.report(config(data={"tokenizer": "./missing/tokenizer.json"}), 1)


def test_a_padded_vocabulary_needs_no_tokenizer_of_the_hub(monkeypatch):
    def refuse(*_args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(tokenizer, "fetch", refuse)
    padded = {"model": {"vocab_size": 320, "tie_embeddings": False}}
    text = check.report(config(**padded, data={"tokenizer": "some/model"}), 1)
    assert f"{sizes(build_model(config(**padded), VOCAB)).total:,} in total" in text
    with pytest.raises(AssertionError, match="the network was asked"):
        check.report(config(data={"tokenizer": "some/model"}), 1)
    with pytest.raises(ValueError, match=r"model.vocab_size \(256\) must be at least the 257 ids"):
        check.report(config(model={"vocab_size": 256}), 1)


def test_host_memory_is_that_of_weights_and_moments_and_only_where_it_is_taken():
    def lines(**checkpoint) -> dict[str, float]:
        made = config(model={"dim": 2048, "ffn_dim": 4096}, checkpoint=checkpoint)
        text = check.report(made, 2)
        return {name: float(size) for name, size in re.findall(r"(\S.*?) +([\d.]+)$", text, re.M)}

    saving = lines(every=5)
    copied = saving["weights"] + saving["Adam moments"]
    assert copied > 0.1
    assert saving["host, to save from"] == pytest.approx(copied, abs=2e-3)
    assert "host, to save from" not in lines(every=0)
    assert "host, to save from" not in lines(every=5, asynchronous=False)
