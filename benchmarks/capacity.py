"""Which capacity factor? Sweep a config, and get a report that recommends one.

    python benchmarks/capacity.py CONFIG [--capacity-factors 1.0 1.25 2.0 null] [--routers ...]
        [--top-ks ...] [--experts ...] [--drop-policies ...] [--groups ...] [--warm-start 60]
        [--steps 60] [--repeats 2] [--out FOLDER] [--section.field value ...]
    python -m moetrain.torchrun --nproc-per-node 2 benchmarks/capacity.py CONFIG --parallel.ep 2 ...

Every combination of the values given is a variant. Those of one gate, K and number of experts train
on from one shared start, all in turn, so that losses and speeds can be compared. CONFIG and the
flags of its settings are those of `moetrain train`. Writes capacity.{html,md,json,csv,png}.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from sweeping import live, plan
from sweeping.advice import advise
from sweeping.table import Sweep, live_rows
from sweeping.writing import write

from moetrain import cli, settings
from moetrain.config import Config
from moetrain.constraints import spell
from moetrain.errors import UserError
from moetrain.failure import end_with_launcher
from moetrain.mesh import Mesh, process_group, rank_and_world

Flags = Annotated[
    dict[str, Any],
    tyro.conf.arg(constructor=settings.flags_of(Config, without="out"), name=""),
]


@dataclass(frozen=True)
class Options:
    """Sweep capacity factors, and what they interact with, over a config."""

    config: cli.ConfigPath
    """YAML file of settings; flags lie over it."""
    flags: Flags
    capacity_factors: list[float | None] = field(
        default_factory=lambda: [0.75, 1.0, 1.25, 1.5, 2.0, None]
    )
    """Training factors; null: dropless."""
    routers: list[str] = field(default_factory=list)
    """Gates. Here and below, the config's own value where none is given."""
    top_ks: list[int] = field(default_factory=list)
    """Experts per token."""
    experts: list[int] = field(default_factory=list)
    """Experts per layer."""
    drop_policies: list[str] = field(default_factory=list)
    """Who keeps a slot of a full expert."""
    groups: list[str] = field(default_factory=list)
    """Routing groups: sequence, microbatch or a number of tokens."""
    warm_start: int = 60
    """Optimizer steps of the shared start, at the config's own factor, drop policy and group."""
    steps: int = 60
    """Optimizer steps of every variant, after the start."""
    repeats: int = 2
    """How often all that is done, from the same start with the text that follows; one tells nothing
    of noise."""
    out: Path | None = None
    """Folder of the report; null: runs/NAME-capacity."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    return cli.guarded(lambda: run(parse(sys.argv[1:] if args is None else args)))


def parse(args: Sequence[str]) -> Options:
    """Read a command line; `UserError` where it is wrong."""
    settings.check_flag_names(args)
    with settings.one_message(args):
        options = tyro.cli(Options, prog="capacity.py", args=args, registry=settings.REGISTRY)
    for name, value, least in (
        ("warm-start", options.warm_start, 0),
        ("steps", options.steps, 2),
        ("repeats", options.repeats, 1),
    ):
        if value < least:
            raise UserError(f"--{name} ({value}) must be {least} or more")
    return options


def run(options: Options) -> int:
    """Sweep, write the report, and say what it recommends."""
    end_with_launcher()
    base = settings.resolve(options.config, options.flags)
    length = plan.Length(options.warm_start, options.steps)
    rank, world = rank_and_world()
    able, refused = plan.variants(base, values(options), length.total, world)
    folder = options.out or base.out / f"{base.name}-capacity"
    say = (lambda text: print(f"capacity: {text}", file=sys.stderr)) if rank == 0 else _silent
    for one in refused:
        say(f"left out: {one.label}: {one.reason}")
    with process_group() as device:
        parallel = base.parallel
        mesh = Mesh(device, parallel.ep, parallel.dp_replicate, parallel.nodes_apart)
        seen = live.sweep(able, base, length, options.repeats, mesh, folder, say)
        if rank == 0:
            own = plan.own(able, base)
            rows, told = live_rows(able, seen, own), described(base, length, options.repeats, world)
            sweep = Sweep(base.name, *told, rows, own.label, refused, settings.redacted(base))
            for path in write(sweep, folder):
                say(str(path))
            print(advise(rows).headline)
    return 0


def values(options: Options) -> dict[str, list[Any]]:
    """What each axis takes; empty for the config's own."""
    return {
        "router": options.routers,
        "top_k": options.top_ks,
        "experts": options.experts,
        "drop_policy": options.drop_policies,
        "group": [int(group) if group.isdigit() else group for group in options.groups],
        "capacity_factor": options.capacity_factors,
    }


def described(base: Config, length: plan.Length, repeats: int, world: int) -> tuple[str, str]:
    """What was done, and how large and long it was."""
    model, train = base.model, base.train
    tokens = train.global_batch * base.data.seq_len
    what = (
        f"{length.warm_start} steps at the config's own setting, then {length.steps} of every "
        f"variant from there, in turn, {repeats} time{'s' * (repeats > 1)}; "
        f"{tokens:,} tokens a step, on {world} rank{'s' * (world > 1)} with expert parallelism "
        f"{base.parallel.ep}, in {base.engine.precision}. Held-out loss is in nats per token, at "
        f"an evaluation factor of {spell(base.moe.eval_capacity_factor)} for all."
    )
    scale = (
        f"{model.layers} layers of width {model.dim} after {length.total} steps "
        f"({length.total * tokens:,} tokens)"
    )
    return what, scale


def _silent(_: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
