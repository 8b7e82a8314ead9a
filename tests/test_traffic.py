"""Collectives of a step by hand; against real steps they are held in tests/ranks."""

from __future__ import annotations

from typing import Any

from models import SMALL

from moetrain import check, settings
from moetrain.build import build_model
from moetrain.config import Config
from moetrain.traffic import traffic

VOCAB = 257  # of the bytes tokenizer


def config(**sections: Any) -> Config:
    merged = {
        name: {**SMALL.get(name, {}), **sections.get(name, {})}
        for name in SMALL.keys() | sections.keys()
    }
    merged["train"] = {"global_batch": 32, "micro_batch": 2, **merged.get("train", {})}
    return settings.resolve(None, merged)


def found(made: Config, world: int) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Ranks, number and bytes by purpose and axis."""
    rows = traffic(made, build_model(made, VOCAB), world)
    return {(row.what, row.axis): (row.ranks, row.count, row.num_bytes) for row in rows}


BLOCK = 4 * 16 * 16 + 2 * 16
"""Attention and two norms."""
EXPERTS = 4 * 3 * 16 * 12
ROOT = 260 * 16 + 16
"""The embedding with rows that make it divisible, and a norm."""


STATISTICS = {
    ("targets, tokens and groups", "world"): (8, 1, 24),
    ("gradient norm, loss", "world"): (8, 1, 16),
}


def test_fsdp_by_hand():
    """8 ranks: two copies of four, two of which share the experts. Two micro-batches, two blocks,
    bf16. A micro-batch has 2 groups of 8 tokens, each with ⌈1.25 · 2 · 8 / 4⌉ = 5 slots."""
    parallel, moe = {"ep": 2, "dp_replicate": 2}, {"capacity_factor": 1.25}
    made = config(parallel=parallel, moe=moe, engine={"precision": "bf16"})
    assert found(made, 8) == {
        ("weights", "dp_shard"): (4, 2 + 8, (2 * ROOT + 8 * BLOCK) * 2),
        ("experts' weights", "edp"): (2, 8, 8 * EXPERTS // 2 * 2),
        ("gradients", "dp_shard"): (4, 3, (ROOT + 2 * BLOCK) * 4),
        ("experts' gradients", "edp"): (2, 2, 2 * EXPERTS // 2 * 4),
        ("gradients", "dp_replicate"): (2, 3, (ROOT + 2 * BLOCK) // 4 * 4),
        ("experts' gradients", "dp_replicate"): (2, 2, 2 * EXPERTS // 4 * 4),
        ("routers' gradients", "world"): (8, 1, 2 * 4 * 16 * 4),
        ("rows", "ep"): (2, 2 * 2 * 4, 2 * 2 * 4 * (4 * 2 * 5 * 16) * 2),
        **STATISTICS,
    }


def of_rows(made: Config) -> dict[str, tuple[int, int, int]]:
    return {axis: value for (what, axis), value in found(made, 8).items() if what == "rows"}


def test_rows_by_hand():
    """Two layers of 16 tokens with 2 choices each, in fp32, at the two micro-batches of a step."""
    each = 16 * 2 * 16 * 4
    moe = {"capacity_factor": None}
    made = config(parallel={"ep": 4, "overlap_chunks": 1}, moe=moe)
    assert of_rows(made) == {"ep": (4, 2 * 2 * 4, 2 * 2 * 4 * each)}
    assert found(made, 8)["row counts", "ep"] == (4, 2 * 2, 2 * 2 * 4 * 8)
    full = {"activation_checkpointing": "full"}
    again = config(parallel={"ep": 4}, moe=moe, engine=full)
    assert of_rows(again) == {"ep": (4, 2 * 2 * 6, 2 * 2 * 6 * each)}
    assert found(again, 8)["row counts", "ep"] == (4, 2 * 4, 2 * 4 * 4 * 8)
    parallel = {"ep": 4, "dispatch": "two_level", "nodes": 2}
    levels = of_rows(config(parallel=parallel, moe=moe))
    assert levels == dict.fromkeys(
        ("inside node", "across nodes"), (2, 2 * 2 * 4, 2 * 2 * 4 * each)
    )
    chunked = config(
        parallel={"ep": 4, "overlap_chunks": 2}, moe={"experts": 8, "capacity_factor": None}
    )
    assert of_rows(chunked) == {"ep": (4, 2 * 2 * 2 * 4, 2 * 2 * 4 * each)}


def test_all_gather_by_hand():
    """Four ranks of 16 tokens each; two layers, two micro-batches."""
    rows = found(config(parallel={"ep": 4, "dispatch": "all_gather"}), 8)
    x, plans, gates = 4 * 16 * 16 * 4, 4 * (16 * 2 + 4) * 8, 4 * 16 * 2 * 4
    assert rows["tokens, gates and plans", "ep"] == (4, 2 * 2 * 3, 2 * 2 * (x + plans + gates))
    assert rows["sums and gradients", "ep"] == (4, 2 * 2 * 4, 2 * 2 * (3 * x + gates))


def test_deepspeed_by_hand():
    """Eight ranks, two micro-batches, in fp32 whatever the precision. Weights that do not decay are
    the five norms; each kind in shares of even length: 16 elements for eight ranks, 8 for four."""
    router, norms = 4 * 16, 5 * 16
    matrices = 257 * 16 + 2 * (4 * 16 * 16 + router)
    held = 2 * EXPERTS // 2
    for stage, rounds in ((0, 1), (1, 1), (2, 2)):
        engine = {"kind": "deepspeed", "zero_stage": stage, "precision": "bf16"}
        rows = found(config(parallel={"ep": 2}, engine=engine), 8)
        dense = matrices + norms
        assert rows["gradients", "world"] == (8, rounds, rounds * dense * 4)
        assert rows["experts' gradients", "edp"] == (4, rounds, rounds * held * 4)
        if stage == 0:
            assert "weights" not in {what for what, _ in rows}
        else:
            assert (matrices % 16, norms % 16, held % 8) == (0, 0, 0)
            assert rows["weights", "world"] == (8, 2, dense * 4)
            assert rows["experts' weights", "edp"] == (4, 1, held * 4)


def test_a_model_of_many_buckets_is_reduced_bucket_by_bucket(tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    engine = {"kind": "deepspeed", "precision": "fp32", "deepspeed_config": str(file)}
    made = config(moe={"experts": 0}, engine=engine)
    numel = sum(weight.numel() for weight in build_model(made, VOCAB).parameters())
    assert found(made, 8)["gradients", "world"] == (8, -(-numel // 1000), numel * 4)


def test_statistics_by_hand():
    """Batch balance over two layers of four experts: choices and valid tokens, and masses."""
    moe = {"router": "sigmoid", "bias_update_rate": 0.1, "balance_scope": "batch"}
    rows = found(config(moe={**moe, "balance_coef": 0.1}), 8)
    assert rows["balance of the batch", "world"] == (8, 2, 2 * (5 * 8 + 4 * 8))
    assert rows["loads of experts", "world"] == (8, 1, 2 * 4 * 8)
    # surveyed: six passes of two blocks and their experts rather than four
    assert rows["weights", "dp_shard"][1] == 2 + 6 * 2
    assert rows["experts' weights", "edp"][1] == 6 * 2


def test_the_autopilot_has_the_rows_of_its_largest_factor():
    """And a sum of its own: of two layers the assignments, and what nine factors would drop."""
    parallel = {"ep": 2}
    auto = found(config(parallel=parallel, moe={"capacity_factor": "auto"}), 8)
    assert auto.pop(("drops by capacity factor", "world")) == (8, 1, 2 * 10 * 8)
    assert auto == found(config(parallel=parallel, moe={"capacity_factor": 4.0}), 8)


def test_one_rank_is_silent():
    assert found(config(), 1) == {}
    assert "traffic" not in check.report(config(), 1)


def test_check_prints_it():
    lines = check.report(config(parallel={"ep": 2}), 8).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("traffic"))
    assert lines[start].split()[-3:] == ["among", "number", "bytes"]
    rows = found(config(parallel={"ep": 2}), 8)
    assert len(lines) == start + 1 + len(rows)
    for line, ((what, axis), (ranks, count, num_bytes)) in zip(
        lines[start + 1 :], rows.items(), strict=True
    ):
        assert line.strip().startswith(what)
        assert line.endswith(f" {num_bytes:,}")
        assert line.split()[-4:-1] == [axis.split()[-1], str(ranks), f"{count:,}"]
