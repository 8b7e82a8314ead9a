"""Whole training steps: moetrain's against a Hugging Face Mixtral trained by plain PyTorch.

    python benchmarks/step.py [--shapes quickstart medium] [--precisions bf16 fp32] [--ranks 1]
        [--profile] [--device cpu]

All train the same model: the same shape, weights, text, batches, optimizer and precision; before
anything is timed, their parameters are counted and their losses compared. moetrain's contender is
the step of a run (`moetrain.step.train_step`), with all it counts. Steps per second are ratios
within rounds in which everyone has a turn. MFU counts the FLOPs of the model, alike for all, and is
told where the peak of the device is known. Several ranks have a GPU each (or share the cores of the
CPU) and train on as many tokens each as one does: moetrain with its experts spread over them, the
Mixtral in copies by DistributedDataParallel. `--profile` adds where the time goes. Writes
step.{json,md} into results/ (step-cuda on a GPU).
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import harness
import operators
import record
import torch
from harness import AbsentError, Contender, Field, Spread
from stepping import mixtral, own, profile
from stepping.shapes import SHAPES, USUAL, Cell, config_of, tokens_per_step

from moetrain.build import build_model
from moetrain.data import load_tokenizer
from moetrain.errors import UserError
from moetrain.peaks import device_peak_flops
from moetrain.sizes import Sizes, sizes, train_flops_per_token

BUILDERS = {
    "moetrain": own.capacity_step,
    "moetrain-dropless": own.dropless_step,
    "hf-eager": mixtral.eager_step,
    "hf-grouped": mixtral.grouped_step,
}
TARGET = 1.5
"""Of moetrain's steps per second, times those of the fastest plain Mixtral, on CPUs."""
MFU_TARGETS = {"mixtral": 0.45, "olmoe": 0.30}
"""Of moetrain on GPUs, by shape."""
TOLERANCE = 1e-4
"""Nats per token between the losses of the same weights."""


def main() -> None:
    options = arguments()
    names = options.contenders
    ranks = options.ranks
    cells = [Cell(shape, kind, ranks) for shape in options.shapes for kind in options.precisions]
    found = []
    contenders = [Contender(name, BUILDERS[name], ranks) for name in names]
    with Field(contenders, options.device) as field:
        for cell in cells:
            found.append(measure(field, cell, options.rounds, torch.device(options.device)))
    profiles = profile_all(cells, names, options.device) if options.profile else []
    data = {"options": vars(options), "cells": found, "profiles": profiles}
    name, page = record.name_on(options.device, "step"), report(found, profiles, options)
    print(record.write(name, data, page, device=options.device))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whole training steps against a plain Mixtral's.")
    harness.add_device(parser)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="models to train")
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"))
    parser.add_argument("--contenders", nargs="+", choices=list(BUILDERS), default=list(BUILDERS))
    parser.add_argument("--ranks", type=int, default=1, help="that train together")
    parser.add_argument("--rounds", type=int, default=8, help="turns of everyone")
    parser.add_argument("--profile", action="store_true", help="say where the time goes, too")
    options = parser.parse_args()
    options.shapes = options.shapes or USUAL[options.device]
    options.precisions = options.precisions or [harness.usual_dtype(options.device)]
    harness.require_at_least(parser, options, rounds=1, ranks=1)
    gpus = torch.cuda.device_count()
    if options.device == "cuda" and options.ranks > gpus:
        parser.error(f"--ranks ({options.ranks}) needs as many GPUs, and there are {gpus}")
    for shape in options.shapes:
        try:
            config_of(Cell(shape, "fp32", options.ranks), None)
        except UserError as error:
            parser.error(f"--ranks ({options.ranks}): {error}")
    return options


def measure(field: Field, cell: Cell, rounds: int, device: torch.device) -> dict[str, Any]:
    """Build a cell everywhere, check that all are the same model, and let them take turns."""
    title = title_of(cell._asdict())
    say(f"{title}: building")
    built = field.build(cell)
    absent = {name: str(why) for name, why in built.items() if isinstance(why, AbsentError)}
    facts = {name: ranks[0] for name, ranks in built.items() if not isinstance(ranks, AbsentError)}
    counted, flops = model_sizes(cell)
    check_alike(facts, counted.total)
    say(f"{title}: {counted.total:,} parameters, losses alike; measuring")
    samples = field.measure(rounds)
    dropped = {name: drop_rate(ranks) for name, ranks in field.facts().items()}
    peak = device_peak_flops(device, cell.precision)
    config = config_of(cell, None)
    tokens = tokens_per_step(config)
    for name, sample in samples.items():
        say(f"  {name}: {harness.spread(sample.seconds).show('.3f')} s")
    each = flops * tokens / cell.ranks
    shares = peak and {name: mfu(s.seconds, each, peak) for name, s in samples.items()}
    return {
        **cell._asdict(),
        "model": config.model.model_dump(),
        "moe": config.moe.model_dump(),
        "sequences": config.train.global_batch,
        "micro_batch": config.train.micro_batch,
        "seq_len": config.data.seq_len,
        "parameters": counted.total,
        "active": counted.active,
        "facts": facts,
        "absent": absent,
        "dropped": dropped,
        "samples": {name: sample._asdict() for name, sample in samples.items()},
        "mfu": shares,
    }


def model_sizes(cell: Cell) -> tuple[Sizes, int]:
    """Parameters, and model FLOPs per token of a training step."""
    config = config_of(cell, None)
    model = build_model(config, load_tokenizer(config.data.tokenizer).vocab_size)
    return sizes(model), train_flops_per_token(model, config.data.seq_len)


def check_alike(facts: dict[str, dict[str, float]], parameters: int) -> None:
    """Raise RuntimeError unless all contenders are the same function with as many parameters."""
    losses = [of_one["loss"] for of_one in facts.values()]
    if max(losses, default=0.0) - min(losses, default=0.0) > TOLERANCE:
        raise RuntimeError(f"the losses of the same weights differ: {facts}")
    if any(of_one["parameters"] != parameters for of_one in facts.values()):
        raise RuntimeError(f"not all have {parameters} parameters: {facts}")


def drop_rate(ranks: list[dict[str, float]]) -> float:
    """Of the last step's assignments, on all ranks; whoever does not count them drops none."""
    dropped, assigned = (sum(one.get(key, 0) for one in ranks) for key in ("dropped", "assigned"))
    return dropped / max(1, assigned)


def mfu(seconds: list[float], flops: float, peak: float) -> Spread:
    """Model FLOPs utilization: what a device's model FLOPs of a step come to, of its peak."""
    return harness.spread([flops / of_one / peak for of_one in seconds])


def profile_all(
    cells: list[Cell], names: list[str], device: harness.Device
) -> list[dict[str, Any]]:
    """Where the time of every contender goes, in every cell."""
    contenders = [
        Contender(name, partial(profile.Profiled, BUILDERS[name]), cells[0].ranks) for name in names
    ]
    found = []
    with Field(contenders, device) as field:
        for cell in cells:
            say(f"{title_of(cell._asdict())}: profiling")
            for name, ranks in field.build(cell).items():
                if not isinstance(ranks, AbsentError):
                    found.append({**cell._asdict(), "contender": name, **ranks[0]})
    return found


def title_of(cell: dict[str, Any]) -> str:
    """Of what is kept of a cell."""
    several = f", {cell['ranks']} ranks" if cell["ranks"] > 1 else ""
    return f"{cell['shape']}, {cell['precision']}{several}"


def say(text: str) -> None:
    print(text, flush=True)


# ---- report --------------------------------------------------------------------------------------


def report(
    cells: list[dict[str, Any]], profiles: list[dict[str, Any]], options: argparse.Namespace
) -> str:
    parts = [
        "# Whole training steps",
        f"Forward, backward and update; {options.rounds} rounds in which everyone has a turn. "
        "`hf-` is Hugging Face's Mixtral, trained by plain PyTorch (autocast in bf16, fused AdamW, "
        "`clip_grad_norm_`). All start from the same weights, read the same batches, and agree on "
        f"the first loss within {TOLERANCE} nats. moetrain has a capacity factor of 1.25 where it "
        "is not dropless. *Speed* is steps per second over those of the fastest `hf-` of the same "
        "round (of the first contender where there is none): median (least–most). *Memory* is the "
        "most that a step takes beyond weights and moments, of all ranks together. In bold what "
        f"falls short of moetrain's target: {target_of(options.device)}.",
    ]
    if any("dropped" in cell for cell in cells):
        parts.append(
            "*Dropped* are assignments of the last step, which are not computed: where they are "
            "many, look at `moetrain-dropless`."
        )
    for cell in cells:
        parts += [f"## {title_of(cell)}", describe(cell), results(cell, options.device)]
        parts += [f"Left out: {name}, since {why}." for name, why in cell["absent"].items()]
    if profiles:
        parts += ["## Where the time goes", *map(profile_table, profiles)]
    return "\n\n".join(parts)


def target_of(device: harness.Device) -> str:
    """In words."""
    if device == "cpu":
        return f"{TARGET} times"
    shares = ", ".join(f"{share:.0%} ({shape})" for shape, share in MFU_TARGETS.items())
    return f"a MFU of {shares}, and ahead of every `hf-`"


def describe(cell: dict[str, Any]) -> str:
    model, moe = cell["model"], cell["moe"]
    return (
        f"Width {model['dim']}, {model['layers']} layers, {moe['experts']} experts of width "
        f"{moe['expert_ffn_dim']}, top-{moe['top_k']}; {cell['parameters']:,} parameters, "
        f"{cell['active']:,} of them active; {cell['sequences']} sequences of {cell['seq_len']} "
        f"tokens a step, {cell['micro_batch']} in a micro-batch."
    )


def results(cell: dict[str, Any], device: harness.Device) -> str:
    """The table of a cell; of a GPU with absolute rates."""
    on_gpu, target = device == "cuda", TARGET if device == "cpu" else 1.0
    tokens = cell["sequences"] * cell["seq_len"]
    samples: dict[str, Any] = cell["samples"]
    others = [name for name in samples if name.startswith("hf-")] or list(samples)[:1]
    rounds = [min(turn) for turn in zip(*(samples[n]["seconds"] for n in others), strict=True)]
    rows = []
    for name, sample in samples.items():
        speed = harness.ratio(rounds, sample["seconds"])
        is_ours = not name.startswith("hf-") and others[0].startswith("hf-")
        row = [name, record.marked(speed.show(), is_ours and round(speed.median, 2) < target)]
        row.append(f"{sample['peak_bytes'] / 2**20:,.0f} MiB")
        if "dropped" in cell:
            row.append(f"{cell['dropped'][name]:.1%}")
        if on_gpu:
            row.append(f"{tokens / statistics.median(sample['seconds']):,.0f}")
        if cell["mfu"]:
            share, least = cell["mfu"][name], MFU_TARGETS.get(cell["shape"], 0.0)
            row.append(record.marked(share.show(".1%"), is_ours and round(share.median, 3) < least))
        rows.append(row)
    header = ["", "speed", "memory", *(["dropped"] if "dropped" in cell else [])]
    header += ["tokens/s"] if on_gpu else []
    return record.table([*header, *(["MFU"] if cell["mfu"] else [])], rows)


def profile_table(found: dict[str, Any]) -> str:
    title = f"### {title_of(found)}: {found['contender']}"
    phases = ""
    if found["phases"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in found["phases"].items())
        phases = f"Of a step: {shares}.\n\n"
    return f"{title}\n\n{phases}{operators.table(found['operators'])}"


if __name__ == "__main__":
    main()
