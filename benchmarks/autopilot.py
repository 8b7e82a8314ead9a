"""Does `moe.capacity_factor: auto` hold its target? The quickstart with it, beside fixed factors.

    python benchmarks/autopilot.py [--steps 208]

Trains configs/quickstart.yaml on two processes with two targets and with two fixed factors, one
after the other, all from the same seed. Writes autopilot.{json,md,png} into results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import record

from moetrain.autopilot import FACTORS, STEPS

Lines = Sequence[Mapping[str, Any]]
RUNS: dict[str, dict[str, Any]] = {
    "auto, target 1 %": {"capacity_factor": "auto", "target_drop_rate": 0.01},
    "factor 1.25": {"capacity_factor": 1.25},
    "auto, target 5 %": {"capacity_factor": "auto", "target_drop_rate": 0.05},
    "factor 2.0": {"capacity_factor": 2.0},
}
WARM_UP = 6 * STEPS
"""Steps in which the router is young, and the autopilot on its way down."""
LAYER_FIELDS = ("capacity_factor", "assigned", "dropped", "slots", "kept")


def main() -> None:
    parser = argparse.ArgumentParser(description="Does the capacity autopilot hold its target?")
    parser.add_argument("--steps", type=int, default=13 * STEPS, help="optimizer steps of each run")
    options = parser.parse_args()
    if options.steps < WARM_UP + STEPS:
        parser.error(f"--steps ({options.steps}) must be at least {WARM_UP + STEPS}")
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: train(Path(folder), name, options.steps) for name in RUNS}
    data = {"config": "configs/quickstart.yaml", "settings": RUNS, "steps": options.steps}
    draw(runs)
    record.write("autopilot", {**data, "runs": runs}, report(runs, options.steps))
    print((record.RESULTS / "autopilot.md").read_text())


def train(folder: Path, name: str, steps: int) -> dict[str, Any]:
    """One run; returns its held-out loss and, of every step, what the report is made of."""
    run = str(list(RUNS).index(name))
    flags = {"name": run, "out": folder, "log.every": 1, "train.steps": steps}
    flags |= {"eval.every": steps, "checkpoint.every": 0}
    flags |= {f"moe.{field}": value for field, value in RUNS[name].items()}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    command = ["-m", "moetrain", "train", str(record.ROOT / "configs" / "quickstart.yaml")]
    subprocess.run([*launcher, *command, *settings], check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").open()]
    return {
        "nats_per_byte": lines[-1]["eval_nats_per_byte"],
        "steps": [
            {
                **{field: line[field] for field in ("step", "loss", "tokens_per_s")},
                "layers": [{field: of[field] for field in LAYER_FIELDS} for of in line["layers"]],
            }
            for line in lines
            if "loss" in line
        ],
    }


# ---- figures -------------------------------------------------------------------------------------


def share(lines: Lines, name: str, of: str, layer: int | None = None) -> float:
    """Σ name / Σ of, over steps and over all layers or one."""
    layers = [each for line in lines for number, each in enumerate(line["layers"])
              if layer in (None, number)]  # fmt: skip
    return sum(each[name] for each in layers) / sum(each[of] for each in layers)


def windows(lines: Lines) -> list[Lines]:
    """The steps that were decided on together."""
    whole = len(lines) // STEPS * STEPS
    return [lines[first : first + STEPS] for first in range(0, whole, STEPS)]


def windows_within(lines: Lines, target: float) -> tuple[int, int]:
    """Of the windows of all layers, how many dropped no more than the target; and how many."""
    rates = [
        share(window, "dropped", "assigned", layer)
        for window in windows(lines)
        for layer in range(len(lines[0]["layers"]))
    ]
    return sum(rate <= target for rate in rates), len(rates)


def mean_factor(lines: Lines) -> float:
    return statistics.mean(of["capacity_factor"] for line in lines for of in line["layers"])


def moves(lines: Lines) -> tuple[int, int]:
    """How often a layer went down, and up."""
    pairs = [
        (one["capacity_factor"], other["capacity_factor"])
        for before, after in pairwise(lines)
        for one, other in zip(before["layers"], after["layers"], strict=True)
    ]
    return sum(was > now for was, now in pairs), sum(was < now for was, now in pairs)


# ---- what is written -----------------------------------------------------------------------------


def report(runs: Mapping[str, Mapping[str, Any]], steps: int) -> str:
    late = {name: run["steps"][WARM_UP:] for name, run in runs.items()}
    usual = {name: statistics.median(line["tokens_per_s"] for line in lines)
             for name, lines in late.items()}  # fmt: skip
    rows = [
        [
            name,
            f"{mean_factor(lines):.2f}",
            f"{share(lines, 'dropped', 'assigned'):.2%}",
            ", ".join(f"{share(lines, 'dropped', 'assigned', n):.2%}" for n in range(4)),
            f"{1 - share(lines, 'kept', 'slots'):.1%}",
            f"{usual[name] / usual['factor 1.25']:.2f}",
            f"{runs[name]['nats_per_byte']:.4f}",
        ]
        for name, lines in late.items()
    ]
    header = ["run", "mean factor", "dropped", "by layer", "slots empty", "tokens/s", "held-out"]
    return "\n".join(
        [
            "# The capacity autopilot on the quickstart",
            "",
            f"`configs/quickstart.yaml`, {steps} steps on two processes, one seed; drops, empty "
            f"slots and speed are of the steps after {WARM_UP}. Speed is the median, relative to "
            "factor 1.25; runs came one after the other on a machine with other work, so it is a "
            "rough figure. Held-out loss is in nats per byte, evaluated at factor 2.0.",
            "",
            record.table(header, rows),
            "",
            "![Capacity factor of every layer and drop rate over steps](autopilot.png)",
            "",
            *(line for name in runs for line in held(name, runs[name]["steps"])),
        ]
    )


def held(name: str, lines: Lines) -> list[str]:
    """How well a run held its target; of fixed factors, how well they would have."""
    targets = [RUNS[name].get("target_drop_rate")] if "auto" in name else [0.01, 0.05]
    found = []
    for target in targets:
        (of_all, every), (of_late, later) = (
            windows_within(part, target) for part in (lines, lines[WARM_UP:])
        )
        found.append(
            f"{target:.0%} in {of_all} of {every} windows of {STEPS} steps and one layer "
            f"({of_late} of {later} after step {WARM_UP})"
        )
    text = f"- **{name}**: within {', within '.join(found)}"
    if "auto" in name:
        down, up = moves(lines)
        text += f"; layers went down {down} times and up {up} times"
    return [f"{text}."]


def draw(runs: Mapping[str, Mapping[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained", sharex=True)
    auto = [name for name in runs if "auto" in name]
    for (top, bottom), name in zip(grid.T, auto, strict=True):
        lines, target = runs[name]["steps"], RUNS[name]["target_drop_rate"]
        steps = [line["step"] for line in lines]
        for layer in range(len(lines[0]["layers"])):
            colour = plt.get_cmap("viridis")(0.9 * layer / (len(lines[0]["layers"]) - 1))
            factors = [line["layers"][layer]["capacity_factor"] for line in lines]
            moved = [factor + 0.015 * layer for factor in factors]  # beside each other
            top.step(steps, moved, where="mid", color=colour, label=f"MoE layer {layer}")
            ends = [window[-1]["step"] for window in windows(lines)]
            rates = [100 * share(w, "dropped", "assigned", layer) for w in windows(lines)]
            bottom.plot(ends, rates, "o-", markersize=3, color=colour)
        for fixed, colour in (("factor 1.25", "#d55e00"), ("factor 2.0", "#0072b2")):
            ends = [window[-1]["step"] for window in windows(runs[fixed]["steps"])]
            rates = [100 * share(w, "dropped", "assigned") for w in windows(runs[fixed]["steps"])]
            bottom.plot(ends, rates, "--", color=colour, linewidth=1, label=fixed)
        bottom.axhline(100 * target, color="#777777", linewidth=1)
        bottom.annotate("target", (steps[-1], 100 * target), ha="right", va="bottom", fontsize=8)
        top.set(title=name, yticks=FACTORS, ylim=(0.9, FACTORS[-1] + 0.2))
        bottom.set(xlabel="optimizer step", ylim=(-0.2, 4 * 100 * target))
    grid[0, 0].set_ylabel("capacity factor")
    grid[1, 0].set_ylabel(f"dropped in {STEPS} steps (%)")
    for axes in (grid[0, 1], grid[1, 1]):
        axes.legend(frameon=False, fontsize=8)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(record.RESULTS / "autopilot.png", dpi=150)


if __name__ == "__main__":
    main()
