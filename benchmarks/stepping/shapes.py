"""The shapes that are trained, as configurations of a run; nothing else says how large they are."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import record

from moetrain import settings
from moetrain.config import Config

Precision = Literal["fp32", "bf16"]

MIXTRAL: dict[str, Any] = {"router": "topk", "renormalize": True, "z_loss_coef": 0.0}
"""How Mixtral routes, and what its loss is made of. (2401.04088)"""
STEADY: dict[str, Any] = {"warmup_steps": 0, "schedule": "wsd", "steps": 1_000_000, "lr": 3e-4}
"""The same learning rate in every step."""

SHAPES: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "medium": {
        "model": {"dim": 512, "layers": 4, "heads": 8, "vocab_size": 8192},
        "moe": {"experts": 8, "top_k": 2, "expert_ffn_dim": 1024},
        "data": {"seq_len": 512},
        "train": {"global_batch": 4, "micro_batch": 4},
    },
    "mixtral": {
        "model": {"dim": 4096, "layers": 1, "heads": 32, "kv_heads": 8, "vocab_size": 32_000},
        "moe": {"experts": 8, "top_k": 2, "expert_ffn_dim": 14_336},
        "data": {"seq_len": 4096},
        "train": {"global_batch": 4, "micro_batch": 4},
    },
    "olmoe": {
        "model": {"dim": 2048, "layers": 3, "heads": 16, "vocab_size": 50_304},
        "moe": {"experts": 64, "top_k": 8, "expert_ffn_dim": 1024},
        "data": {"seq_len": 4096},
        "train": {"global_batch": 4, "micro_batch": 4},
    },
}
"""The last two have the widths of Mixtral 8x7B and of OLMoE-1B-7B, and as many layers as leave room
for all contenders beside each other on a GPU of 140 GB."""
USUAL = {"cpu": ["quickstart", "medium"], "cuda": ["mixtral", "olmoe"]}


class Cell(NamedTuple):
    """What is measured at a time."""

    shape: str
    precision: Precision
    ranks: int = 1
    """That train together, each on as many tokens as a single one."""


def config_of(cell: Cell, capacity_factor: float | None) -> Config:
    """The run of a cell, its experts spread over all ranks."""
    given = SHAPES[cell.shape]
    path = record.ROOT / "configs" / "quickstart.yaml" if cell.shape == "quickstart" else None
    train = settings.resolve(path, {"train": {**given.get("train", {}), **STEADY}}).train
    sections = {
        "model": given.get("model", {}),
        "moe": {
            **given.get("moe", {}),
            **MIXTRAL,
            "capacity_factor": capacity_factor,
            "eval_capacity_factor": None,
        },
        "parallel": {"ep": cell.ranks},
        "engine": {"precision": cell.precision},
        "data": {**given.get("data", {}), "source": "stdlib", "tokenizer": "bytes"},
        "train": {**train.model_dump(), "global_batch": cell.ranks * train.global_batch},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
    }
    return settings.resolve(path, sections)


def tokens_per_step(config: Config) -> int:
    """Over all micro-batches."""
    return config.train.global_batch * config.data.seq_len
