"""What is run, where, and what is killed when: all that chance decides."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml

Phase = Literal["start-up", "step", "evaluation", "save"]
Target = Literal["one rank", "all ranks", "launcher"]
PHASES: tuple[Phase, ...] = get_args(Phase)

BATCH, EVERY = 8, 5
"""Samples per step, steps between checkpoints."""
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"dim": 16, "layers": 2, "heads": 2, "kv_heads": 1},
    # So little room that every step drops tokens.
    "moe": {"experts": 4, "top_k": 2, "expert_ffn_dim": 16, "capacity_factor": 1.0},
    "data": {"seq_len": 32, "eval_fraction": 0.1},
    "train": {"global_batch": BATCH, "micro_batch": 2, "warmup_steps": 5, "lr": 3e-3},
    "eval": {"every": 7, "sequences": 6},
    "checkpoint": {"every": EVERY, "keep": 3},
    "log": {"every": 1},
}
ROUTERS = ("gshard", "sigmoid")
"""One draws at random; the other has a bias that no gradient moves."""
LAUNCHED = 0.15
"""Share of starts by the real launcher, whose ranks take seconds to import what they need."""


class Layout(NamedTuple):
    """Where a start runs."""

    ranks: int
    ep: int
    replicas: int = 1
    engine: Literal["torch", "deepspeed"] = "torch"

    def __str__(self) -> str:
        replicas = f", {self.replicas} replicas" if self.replicas > 1 else ""
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return f"{ranks}, EP {self.ep}{replicas}, {self.engine}"

    def flags(self) -> list[str]:
        """What the command line says of it."""
        ep, replicas = f"--parallel.ep={self.ep}", f"--parallel.dp-replicate={self.replicas}"
        return [ep, replicas, f"--engine.kind={self.engine}"]


HOME = Layout(2, 2)
SIZES = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
TORCH = (*(Layout(*size) for size in SIZES), Layout(4, 2, replicas=2))
DEEPSPEED = tuple(Layout(*size, engine="deepspeed") for size in SIZES)


class Kind(NamedTuple):
    """What changes within a round, and how equal its end must be to the uninterrupted run's."""

    name: str
    precision: Literal["fp32", "fp64"]
    layouts: Sequence[Layout]
    """Where it may be resumed."""
    equal: Literal["bits", "tolerance", "band"]


KINDS = (
    Kind("same layout, fp32", "fp32", (HOME,), "bits"),
    Kind("any layout, fp64", "fp64", TORCH, "tolerance"),
    Kind("any layout and engine, fp32", "fp32", (*TORCH, *DEEPSPEED), "band"),
)


class Kill(NamedTuple):
    """What is killed when: it is aimed at a phase, but where it hits is for the machine to say."""

    phase: Phase
    steps: int
    """Steps of this start that are begun before it."""
    delay: float
    """Seconds it then waits, once the phase is there."""
    signal: signal.Signals
    target: Target
    rank: int = 0
    """Which, where it is one: counted from the last, and around."""


class Plan(NamedTuple):
    """A start and its end."""

    layout: Layout
    launched: bool = False
    """By the launcher rather than as forks."""
    kill: Kill | None = None
    """None lets it come through."""


def draws(chance: random.Random, layouts: Sequence[Layout]) -> Iterator[Plan]:
    """Any start and any kill, without end."""
    while True:
        launched = chance.random() < LAUNCHED
        yield Plan(chance.choice(layouts), launched, _any_kill(chance, launched))


def _any_kill(chance: random.Random, launched: bool) -> Kill:
    (phase,) = chance.choices(PHASES, weights=(2, 2, 1, 3))
    longest = {"start-up": 10.0 if launched else 1.5}.get(phase, 0.05)
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    targets: tuple[Target, ...] = ("one rank", "all ranks", "launcher")
    return Kill(
        phase,
        steps=0 if phase == "start-up" else chance.randint(0, 3 * EVERY),
        delay=chance.uniform(0, longest),
        signal=chance.choices(signals, weights=(7, 2, 1))[0],
        target=chance.choice(targets if launched else targets[:2]),
        rank=chance.randrange(4),
    )


def write_config(folder: Path, kind: Kind, router: str, steps: int) -> Path:
    """A small run below `folder`, with a text of its own, as YAML."""
    (folder / "text").mkdir(parents=True)
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshr", k=chance.randint(2, 8))) for _ in range(50)]
    for number in range(30):
        text = " ".join(chance.choices(words, k=200))
        (folder / "text" / f"{number:02d}.txt").write_text(text)
    values = {
        **SETTINGS,
        "name": "run",
        "out": str(folder),
        "moe": {**SETTINGS["moe"], "router": router},
        "train": {**SETTINGS["train"], "steps": steps},
        "engine": {"precision": kind.precision},
        "data": {
            **SETTINGS["data"],
            "source": str(folder / "text"),
            "cache": str(folder / "cache"),
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
