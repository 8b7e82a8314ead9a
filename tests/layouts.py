"""What the tests of layouts train, and the layouts.

`CASES` hold every pair of settings of a model, `Text` makes up its sequences, and a `Layout` says
how they are spread over ranks.

Shape suffixes: B sequences, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pytest
import torch

from moetrain.config import (
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    TrainConfig,
)
from moetrain.constraints import check_world
from moetrain.data import Batch

VOCAB, LENGTH, BATCH, EXPERTS = 31, 8, 16, 16
STEPS = 2
"""The second starts from what the first has left: moments, biases, FSDP's order of units, ZeRO's
buckets."""
IGNORE = -100
CLIP_NORM = 0.05
LEARNING_RATE = 0.01


@dataclass(frozen=True)
class Case:
    """One model. Every pair of values of two fields is in CASES, where they go together."""

    gate: str
    """A router, or a variant of one that GATES names."""
    dropless: bool
    drop_policy: Literal["position", "probability", "random", "spill"]
    balance_scope: Literal["group", "batch"]
    shared: Literal["", "none", "sigmoid", "softmax"]
    """How shared experts are weighed; empty without any."""
    documents: bool
    every: int
    tied: bool
    qk_norm: bool
    group: Literal["sequence"] | int

    @property
    def text(self) -> Text:
        """What it is trained on."""
        return Text(self.documents)

    @property
    def moe(self) -> MoEConfig:
        """Its experts: few slots for each, and two more experts to ask for those that spill."""
        options = {"router": self.gate, "top_k": 3, "capacity_factor": 0.75, **GATES[self.gate]}
        factor = None if self.dropless else options.pop("capacity_factor")
        return MoEConfig.model_validate(
            {
                **options, "experts": EXPERTS, "expert_ffn_dim": 8, "group": self.group,
                "capacity_factor": factor, "eval_capacity_factor": factor, "every": self.every,
                "drop_policy": self.drop_policy, "spill_depth": 2, "balance_coef": 0.5,
                "balance_scope": self.balance_scope, "z_loss_coef": 0.1,
                "shared_experts": int(self.shared != ""), "shared_gate": self.shared or "none",
            }
        )  # fmt: skip

    @property
    def config(self) -> Config:
        """The case as a whole run."""
        return Config(
            model=ModelConfig(
                dim=12, layers=2, heads=2, kv_heads=1, ffn_dim=8,
                qk_norm="head" if self.qk_norm else "none",
                tie_embeddings=self.tied,
            ),
            moe=self.moe,
            train=TrainConfig(
                steps=STEPS, global_batch=BATCH, micro_batch=BATCH, lr=LEARNING_RATE,
                min_lr_ratio=1.0, warmup_steps=0, clip_norm=CLIP_NORM, adam_eps=1e-3,
            ),
            data=DataConfig(seq_len=LENGTH),
            engine=EngineConfig(precision="fp64"),
            seed=3,
        )  # fmt: skip

    def __str__(self) -> str:
        """As the ids of tests have it."""
        limit = "dropless" if self.dropless else self.drop_policy
        return f"{self.gate}-{limit}-{self.balance_scope}"


GATES: dict[str, dict[str, Any]] = {
    "switch": {"top_k": 1, "jitter": 0.2},
    "gshard": {"top_k": 2},
    "topk": {"renormalize": False},
    "renormalized": {"router": "topk", "renormalize": True, "expert_dropout": 0.4},
    "noisy_topk": {},
    "sigmoid": {"bias_update_rate": 0.05, "gate_scale": 2.5},
    "limited": {
        "router": "sigmoid", "top_k": 4, "expert_groups": 4, "top_groups": 2,
        "bias_update_rate": 0.05,
    },
    "hierarchical": {"top_k": 4, "expert_groups": 4, "top_groups": 2},
    "expert_choice": {"allow_noncausal": True},
    "hash": {},
    "random": {},
    "balanced": {"capacity_factor": 0.25},
    "dense": {"top_k": EXPERTS, "capacity_factor": 0.5},
}  # fmt: skip
"""Settings of every gate, over those that all share."""

CASES = (
    Case("switch", False, "spill", "group", "sigmoid", False, 1, False, False, "sequence"),
    Case("switch", True, "position", "batch", "none", True, 2, True, True, 4),
    Case("gshard", False, "probability", "group", "", False, 1, False, False, 4),
    Case("gshard", True, "position", "batch", "", True, 2, True, True, "sequence"),
    Case("topk", False, "random", "group", "softmax", True, 1, True, True, 4),
    Case("topk", True, "position", "batch", "none", False, 2, False, False, "sequence"),
    Case("renormalized", False, "random", "batch", "", False, 2, False, True, "sequence"),
    Case("renormalized", True, "position", "group", "softmax", True, 1, True, False, 4),
    Case("noisy_topk", False, "spill", "group", "softmax", True, 1, True, False, "sequence"),
    Case("noisy_topk", True, "position", "batch", "sigmoid", False, 2, False, True, 4),
    Case("sigmoid", True, "position", "group", "", False, 1, True, False, "sequence"),
    Case("sigmoid", False, "probability", "batch", "sigmoid", True, 2, False, True, 4),
    Case("limited", False, "spill", "batch", "", True, 1, False, True, "sequence"),
    Case("limited", True, "position", "group", "none", False, 2, True, False, 4),
    Case(
        "hierarchical", False, "probability", "batch", "softmax", True, 1, False, True, "sequence"
    ),
    Case("hierarchical", True, "position", "group", "sigmoid", False, 2, True, False, 4),
    Case("expert_choice", False, "position", "batch", "", False, 2, True, False, 4),
    Case("expert_choice", False, "position", "group", "", True, 1, False, True, "sequence"),
    Case("hash", True, "position", "batch", "none", False, 1, False, False, "sequence"),
    Case("hash", False, "spill", "group", "none", True, 2, True, True, 4),
    Case("random", True, "position", "group", "none", True, 1, True, True, "sequence"),
    Case("random", False, "random", "batch", "none", False, 2, False, False, 4),
    Case("balanced", True, "position", "batch", "", False, 1, False, False, 4),
    Case("balanced", False, "random", "group", "sigmoid", True, 2, True, True, "sequence"),
    Case("dense", True, "position", "batch", "softmax", False, 2, False, True, 4),
    Case("dense", False, "probability", "group", "none", True, 1, True, False, "sequence"),
)


def pick(gate: str, **fields: Any) -> Case:
    """The only case of a gate with these values."""
    (found,) = [
        case
        for case in CASES
        if case.gate == gate and all(getattr(case, name) == fields[name] for name in fields)
    ]
    return found


@dataclass(frozen=True)
class Text:
    """Sequences made up from their index, some padded at the end, some with labels masked."""

    documents: bool = False
    empty: frozenset[int] = frozenset()
    """Sequences that are padding alone, beside number -1."""
    labels: bool = True
    """False masks every label."""
    sequences: int = BATCH * STEPS

    def __len__(self) -> int:
        return self.sequences

    def batch(self, indices: Sequence[int]) -> Batch:
        """As `moetrain.data.Samples` does it."""
        rows = [self._sequence(index) for index in indices]
        documents = [row.document_BL for row in rows]
        return Batch(
            *(torch.stack(column) for column in list(zip(*rows, strict=True))[:4]),
            torch.stack(documents) if self.documents else None,  # type: ignore[arg-type]
        )

    def _sequence(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(100 + index)
        # Some words are common, so that the experts they choose fill up. Those that begin every
        # other sequence only follow themselves: the same vector up to rounding, which must tie.
        common = torch.arange(1, VOCAB + 1).double().reciprocal()
        words = torch.multinomial(common, LENGTH + 1, replacement=True, generator=generator)
        if index % 2:
            words[:3] = words[0]
        starts = torch.rand(LENGTH, generator=generator) < 0.3
        position = torch.arange(LENGTH)
        real = LENGTH - 3 if index % 5 == 3 else LENGTH
        valid = position < (0 if index == -1 or index in self.empty else real)
        wanted = valid & (position >= index % 4) if self.labels else torch.zeros_like(valid)
        return Batch(
            words[:-1],
            words[1:].where(wanted, IGNORE),
            valid,
            index * LENGTH + position if index >= 0 else torch.zeros_like(position),
            starts.cumsum(0),
        )


class Layout(NamedTuple):
    """How a global batch is spread; `edp` is what remains of the world."""

    world: int
    ep: int
    dp_replicate: int
    micro: int

    def __str__(self) -> str:
        """As the ids of tests have it."""
        edp = self.world // self.ep // self.dp_replicate
        return f"ep{self.ep}-edp{edp}-replicate{self.dp_replicate}-micro{self.micro}"


def spread(config: Config, layout: Layout) -> Config:
    """The config of a layout, checked as a run checks it."""
    sections = config.model_dump()
    sections["parallel"] = ParallelConfig(ep=layout.ep, dp_replicate=layout.dp_replicate)
    sections["train"]["micro_batch"] = layout.micro
    checked = Config.model_validate(sections)
    check_world(checked, layout.world)
    return checked


def rotated(cases: Sequence[Case], layouts: Sequence[Layout]) -> list[Any]:
    """Every case with one of the layouts, each layout with about as many cases."""
    pairs = [(case, layouts[i % len(layouts)]) for i, case in enumerate(cases)]
    return [pytest.param(*pair, id=f"{pair[0]}:{pair[1]}") for pair in pairs]
