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

VOCAB, LENGTH, BATCH, STEPS, EXPERTS = 31, 8, 16, 3, 16
IGNORE = -100
CLIP_NORM = 0.05
LEARNING_RATE = 0.01


@dataclass(frozen=True)
class Case:
    """One model. Every pair of values of two fields is in CASES, where a router allows it."""

    router: Literal["switch", "gshard", "topk", "renormalized"]
    capacity_factor: float | None
    shared_experts: int
    documents: bool
    every: int
    tied: bool
    qk_norm: bool
    group: Literal["sequence"] | int
    jitter: float = 0.0

    @property
    def text(self) -> Text:
        """What it is trained on."""
        return Text(self.documents)

    @property
    def config(self) -> Config:
        """The case as a whole run; `renormalized` is topk with gates that add up to 1."""
        router = "topk" if self.router == "renormalized" else self.router
        return Config(
            model=ModelConfig(
                dim=12, layers=2, heads=2, kv_heads=1, ffn_dim=8, qk_norm=self.qk_norm,
                tie_embeddings=self.tied,
            ),
            moe=MoEConfig(
                experts=EXPERTS, top_k={"switch": 1, "gshard": 2, "topk": 3}[router], router=router,
                renormalize=self.router == "renormalized", jitter=self.jitter, expert_ffn_dim=8,
                capacity_factor=self.capacity_factor, eval_capacity_factor=self.capacity_factor,
                group=self.group, shared_experts=self.shared_experts, every=self.every,
                balance_coef=0.5, z_loss_coef=0.1,
            ),
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
        return "-".join(str(value) for value in vars(self).values())


CASES = (
    Case("switch", 1.0, 0, False, 1, True, False, "sequence", jitter=0.2),
    Case("switch", None, 1, True, 2, False, True, 4, jitter=0.2),
    Case("switch", 1.0, 1, False, 2, True, True, 4),
    Case("switch", None, 0, True, 1, False, False, "sequence"),
    Case("gshard", 1.0, 0, True, 1, False, True, 4),
    Case("gshard", None, 1, False, 2, True, False, "sequence"),
    Case("topk", 1.0, 1, True, 1, True, False, 4),
    Case("topk", None, 0, False, 2, False, True, "sequence"),
    Case("renormalized", 1.0, 1, False, 1, False, True, "sequence"),
    Case("renormalized", None, 0, True, 2, True, False, 4),
)


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
        # Squared, so that some tokens are common and the experts they choose fill up.
        words = (torch.rand(LENGTH + 1, generator=generator).square() * VOCAB).long()
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


def rotated(layouts: Sequence[Layout], times: int = 1) -> list[Any]:
    """Every case with `times` of the layouts, each layout with as many cases.

    An odd number of layouts meets cases with a capacity and dropless ones in turn.
    """
    assert len(layouts) % 2
    pairs = [
        (case, layouts[(i + 2 * turn) % len(layouts)])
        for i, case in enumerate(CASES)
        for turn in range(times)
    ]
    return [pytest.param(*pair, id=f"{pair[0]}:{pair[1]}") for pair in pairs]
