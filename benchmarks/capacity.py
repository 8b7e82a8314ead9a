"""Which capacity factor? Sweep a config, and get a report that recommends one.

    python benchmarks/capacity.py CONFIG [--capacity-factors 1.0 1.25 2.0 null] [--routers ...]
        [--top-ks ...] [--experts ...] [--drop-policies ...] [--groups ...] [--warm-start 60]
        [--steps 60] [--repeats 2] [--out FOLDER] [--section.field value ...]
    python -m moetrain.torchrun --nproc-per-node 2 benchmarks/capacity.py CONFIG --parallel.ep 2 ...
    python benchmarks/capacity.py RUN [--parallel.ep 8] ...

Every combination of the values given is a variant. Those of one gate, K and number of experts train
on from one shared start, all in turn, so that losses and speeds can be compared. CONFIG and the
flags of its settings are those of `moetrain train`. Given the folder of a run that has a routing
trace (log.trace true), it trains nothing and tells what the variants would have dropped of what was
recorded. Writes capacity.{html,md,json,csv,png}.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import tyro

try:
    import plotly  # noqa: F401
except ImportError:
    print("error: capacity.py draws with plotly: pip install -e '.[bench]'", file=sys.stderr)
    raise SystemExit(2) from None
from sweeping import live, plan, replayed
from sweeping.advice import advise
from sweeping.table import Sweep, live_rows
from sweeping.writing import write

from moetrain import cli, settings
from moetrain.commands.base import ConfigPath
from moetrain.config import Config
from moetrain.constraints import spell
from moetrain.errors import UserError
from moetrain.failure import end_with_launcher
from moetrain.mesh import Mesh, gather, process_group, rank_and_world
from moetrain.precision import computes_in
from moetrain.trace import Trace

Flags = Annotated[
    dict[str, Any],
    tyro.conf.arg(
        constructor=settings.flags_of(Config, Config.model_fields.keys() - {"out"}), name=""
    ),
]


@dataclass(frozen=True)
class Options:
    """Sweep capacity factors, and what they interact with, over a config."""

    config: ConfigPath
    """YAML file of settings, which flags lie over; or folder of a run with a routing trace."""
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
    if not options.capacity_factors:
        raise UserError("--capacity-factors needs a number or null; leave it out to have six")
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
    trace = Trace.open(options.config) if options.config.is_dir() else None
    base = trace.settings if trace else settings.resolve(options.config, options.flags)
    home = options.out or Path(base.out) / f"{base.name}-capacity"
    if rank_and_world()[0] == 0:  # it will write: better known before hours of training
        with writing_to(home), tempfile.TemporaryFile(dir=home):
            pass
    sweep = on_trace(options, trace) if trace else trained(options, base)
    if sweep is not None:
        with writing_to(home):
            paths = write(sweep, home)
        for path in paths:
            say(str(path))
        print(advise(sweep.rows).headline)
    return 0


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Make a folder; UserError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"--out ({folder}) cannot be written: {error.strerror}") from None


def trained(options: Options, base: Config) -> Sweep | None:
    """Train the variants of a config; None on ranks that have nothing to tell."""
    if base.init_from is not None:
        raise UserError(f"init_from ({base.init_from}): a sweep starts afresh; leave it out")
    if base.moe.capacity_factor == "auto":
        raise UserError(
            "moe.capacity_factor (auto) chooses by itself in every layer; give a number to compare "
            "with, --moe.capacity-factor 1.25"
        )
    if base.engine.kind != "torch":
        raise UserError(
            f"engine.kind ({base.engine.kind}) cannot change its weights for those of another "
            "variant; set it to torch: it drops the same tokens"
        )
    length, world = plan.Length(options.warm_start, options.steps), rank_and_world()[1]
    able, refused = plan.variants(base, values(options), length.total, world)
    leave_out(refused)
    own, parallel = plan.own(able, base), base.parallel
    with process_group() as device, recording() as folder:
        mesh = Mesh(device, parallel.ep, parallel.dp_replicate, parallel.nodes_apart)
        seen = live.sweep(able, own, base, length, options.repeats, mesh, folder, say)
        if mesh.rank:
            return None
        rows = live_rows(able, seen, own)
        try:
            rows = replayed.beside(rows, able, own, folder)
        except UserError as error:  # nodes without a folder in common, say
            say(f"nothing is replayed: {error}")
    told = described(base, length, options.repeats, world)
    return Sweep(base.name, *told, rows, own.label, refused, settings.redacted(base))


@contextlib.contextmanager
def recording() -> Iterator[Path]:
    """A folder for a trace, of the same name on all ranks, until all are done with it."""
    with tempfile.TemporaryDirectory() as own:
        shared = Path(gather(own)[0])
        yield shared
        dist.barrier()
        shutil.rmtree(shared, ignore_errors=True)  # other nodes have one of their own


def on_trace(options: Options, trace: Trace) -> Sweep:
    """Replay the variants on the routing of a run."""
    if rank_and_world()[1] > 1:
        raise UserError(f"{options.config} is a run: one process replays its trace; start one")
    ep = options.flags.get("parallel", {}).get("ep")
    given = {section: fields for section, fields in options.flags.items() if fields != {}}
    if given not in ({}, {"parallel": {"ep": ep}}):
        raise UserError(
            f"{options.config} is a run: of the settings only --parallel.ep can be another one on "
            "its trace; drop the other flags, or name a CONFIG to train"
        )
    for name in ("warm_start", "steps", "repeats"):
        if getattr(options, name) != getattr(Options, name):
            raise UserError(
                f"{options.config} is a run: nothing is trained on its trace, so "
                f"--{name.replace('_', '-')} ({getattr(options, name)}) has no effect; drop it, or "
                "name a CONFIG"
            )
    able, refused = replayed.variants(trace, values(options), ep)
    leave_out(refused)
    base, steps = trace.settings, trace.steps
    what = (
        f"{len(steps)} recorded steps, {steps[0]} to {steps[-1]}, of {trace.world} "
        f"rank{'s' * (trace.world > 1)}; all-to-all and stragglers at expert parallelism "
        f"{ep or base.parallel.ep}. Nothing was trained: a router that had trained under another "
        "setting would by and by have chosen otherwise."
    )
    tokens = steps[-1] * base.train.global_batch * base.data.seq_len
    scale = f"{size(base)} at steps {steps[0]} to {steps[-1]} ({tokens:,} tokens)"
    own = plan.own(able, base).label
    rows = replayed.rows(trace, able, ep)
    return Sweep(base.name, what, scale, rows, own, refused, settings.redacted(base))


def leave_out(refused: Sequence[plan.Refused]) -> None:
    """Say what cannot run."""
    for one in refused:
        say(f"left out: {one.label}: {one.reason}")


def say(text: str) -> None:
    """Tell how far it is, once for all ranks."""
    if rank_and_world()[0] == 0:
        print(f"capacity: {text}", file=sys.stderr)


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
    train = base.train
    tokens = train.global_batch * base.data.seq_len
    what = (
        f"{length.warm_start} steps at the config's own setting, then {length.steps} of every "
        f"variant from there, in turn, {repeats} time{'s' * (repeats > 1)}; "
        f"{tokens:,} tokens a step, on {world} rank{'s' * (world > 1)} with expert parallelism "
        f"{base.parallel.ep}, in {computes_in(base.engine)}. Held-out loss is in nats per token, "
        f"at an evaluation factor of {spell(base.moe.eval_capacity_factor)} for all."
    )
    scale = f"{size(base)} after {length.total} steps ({length.total * tokens:,} tokens)"
    return what, scale


def size(config: Config) -> str:
    """Of a model, in a few words."""
    return f"{config.model.layers} layers of width {config.model.dim}"


if __name__ == "__main__":
    sys.exit(main())
