"""Does `moe.capacity_factor: auto` hold its target? The quickstart with it, beside fixed factors.

    python benchmarks/autopilot.py [--steps 208] [--seeds 0 1 2] [--runs FOLDER] [--only TEXT]

Trains configs/quickstart.yaml on two processes with two targets and with two fixed factors, one
after the other, from each of the seeds. Runs that FOLDER holds already are not trained again, so
they may be trained one by one. Writes autopilot.{json,md,png} into results/ once all are there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
import record
import training

from moetrain.autopilot import FACTORS, STEPS
from moetrain.sinks import METRICS_FILE, read_metrics

CONFIG = "configs/quickstart.yaml"
Windows = Sequence[Mapping[str, Any]]
"""The steps that were decided on together, in sums."""
Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""By name, the runs of all seeds."""
RUNS: dict[str, dict[str, Any]] = {
    "auto, target 1 %": {"moe.capacity_factor": "auto", "moe.target_drop_rate": 0.01},
    "factor 1.25": {"moe.capacity_factor": 1.25},
    "auto, target 5 %": {"moe.capacity_factor": "auto", "moe.target_drop_rate": 0.05},
    "factor 2.0": {"moe.capacity_factor": 2.0},
}
WARM_UP = 6
"""Windows in which the router is young, and the autopilot on its way down."""
COUNTS = ("assigned", "dropped", "slots", "kept")


def main() -> None:
    parser = argparse.ArgumentParser(description="Does the capacity autopilot hold its target?")
    parser.add_argument("--steps", type=int, default=13 * STEPS, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs")
    parser.add_argument("--only", default="", help="just the runs whose name holds this")
    options = parser.parse_args()
    harness.require_at_least(parser, options, steps=(WARM_UP + 1) * STEPS)
    chosen = [name for name in RUNS if options.only in name]
    if not chosen:
        parser.error(f"--only ({options.only}) is in no name of a run; try one of {list(RUNS)}")
    if len(chosen) < len(RUNS) and options.runs is None:
        parser.error(f"--only ({options.only}) needs --runs, a folder to keep what it trains")
    with tempfile.TemporaryDirectory() as passing:
        folder = options.runs or Path(passing)
        runs = {
            name: [run_of(folder, name, seed, options.steps) for seed in options.seeds]
            for name in chosen
        }
    if len(runs) < len(RUNS):
        return
    data = {"config": CONFIG, "settings": RUNS, "steps": options.steps}
    print(record.write("autopilot", {**data, "runs": runs}, report(runs, options.steps)))
    draw(runs)


def run_of(folder: Path, name: str, seed: int, steps: int) -> dict[str, Any]:
    """The held-out loss and the windows of one run."""
    run = f"{list(RUNS).index(name)}-seed-{seed}-steps-{steps}"
    lines = read_metrics(folder / run) if (folder / run / METRICS_FILE).exists() else []
    if not any("eval_loss" in line for line in lines):
        flags = {"seed": seed, "train.steps": steps, "eval.every": steps}
        flags |= {"log.every": 1, "checkpoint.every": 0, **RUNS[name]}
        lines = training.train(folder, run, record.ROOT / CONFIG, flags, ranks=2)
    starts = range(0, steps // STEPS * STEPS, STEPS)
    seen = [window(lines[start : start + STEPS]) for start in starts]
    return {"nats_per_byte": lines[-1]["eval_nats_per_byte"], "windows": seen}


def window(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Its last step, and every layer's factor and counts."""
    layers = []
    for of_layer in zip(*(line["layers"] for line in lines), strict=True):
        (factor,) = {each["capacity_factor"] for each in of_layer}
        counts = {field: sum(each[field] for each in of_layer) for field in COUNTS}
        layers.append({"capacity_factor": factor, **counts})
    return {"step": lines[-1]["step"], "layers": layers}


# ---- figures -------------------------------------------------------------------------------------


def share(seen: Windows, name: str, of: str, layer: int | None = None) -> float:
    """Σ name / Σ of, over windows and over all layers or one."""
    layers = [
        each
        for window in seen
        for number, each in enumerate(window["layers"])
        if layer in (None, number)
    ]
    return sum(each[name] for each in layers) / sum(each[of] for each in layers)


def within(seen: Windows, target: float) -> str:
    """How many windows of a layer dropped no more than the target."""
    layers = [each for window in seen for each in window["layers"]]
    good = sum(each["dropped"] <= target * each["assigned"] for each in layers)
    return f"{good} of {len(layers)}"


def windows(of_seeds: Sequence[Mapping[str, Any]], first: int = 0) -> list[Mapping[str, Any]]:
    """Those of all seeds, each from its `first` on."""
    return [window for run in of_seeds for window in run["windows"][first:]]


def losses(of_seeds: Sequence[Mapping[str, Any]]) -> list[float]:
    """Held out, by seed."""
    return [run["nats_per_byte"] for run in of_seeds]


def difference(one: Sequence[float], other: Sequence[float]) -> str:
    """The mean over seeds, and its range."""
    return harness.mean_and_range([a - b for a, b in zip(one, other, strict=True)], "+.4f")


def mean_factor(seen: Windows) -> float:
    return statistics.mean(each["capacity_factor"] for of in seen for each in of["layers"])


def moves(seen: Windows) -> tuple[int, int]:
    """How often a layer went down, and up."""
    pairs = [
        (one["capacity_factor"], other["capacity_factor"])
        for before, after in pairwise(seen)
        for one, other in zip(before["layers"], after["layers"], strict=True)
    ]
    return sum(was > now for was, now in pairs), sum(was < now for was, now in pairs)


# ---- what is written -----------------------------------------------------------------------------


def report(runs: Runs, steps: int) -> str:
    late = {name: windows(of_seeds, WARM_UP) for name, of_seeds in runs.items()}
    usual = losses(runs["factor 1.25"])
    rows = [
        [
            name,
            f"{mean_factor(seen):.2f}",
            f"{share(seen, 'dropped', 'assigned'):.2%}",
            ", ".join(f"{share(seen, 'dropped', 'assigned', n):.2%}" for n in range(4)),
            f"{1 - share(seen, 'kept', 'slots'):.1%}",
            f"{statistics.mean(losses(runs[name])):.4f}",
            difference(losses(runs[name]), usual),
        ]
        for name, seen in late.items()
    ]
    header = ["run", "mean factor", "dropped", "by layer", "slots empty", "held-out", "less 1.25's"]
    return "\n".join(
        [
            "# The capacity autopilot on the quickstart",
            "",
            f"`configs/quickstart.yaml`, {steps} steps on two processes from each of {len(usual)} "
            f"seeds; factor, drops and empty slots are of the steps after {WARM_UP * STEPS}, over "
            "all seeds. Held-out loss is in nats per byte, evaluated at factor 2.0: the mean over "
            "seeds, and its mean difference from that of factor 1.25 at the same seed "
            "(least–most). A target is one of drops, not of loss: what a factor costs in loss it "
            "does not say. Speed was not compared: it takes runs side by side on a machine without "
            "other work.",
            "",
            record.table(header, rows),
            "",
            f"How many windows ({STEPS} steps of one layer, what the autopilot decides by) dropped "
            f"no more than a target; in brackets those after step {WARM_UP * STEPS}:",
            "",
            record.table(
                ["run", "1 %", "5 %", "layers went down", "up"],
                [held(name, of_seeds) for name, of_seeds in runs.items()],
            ),
            "",
            "![Capacity factor of every layer and drop rate over steps](autopilot.png)",
            "",
            "The picture shows the first seed.",
        ]
    )


def held(name: str, of_seeds: Sequence[Mapping[str, Any]]) -> list[object]:
    cells = [
        f"{within(windows(of_seeds), target)} ({within(windows(of_seeds, WARM_UP), target)})"
        for target in (0.01, 0.05)
    ]
    changes = [moves(run["windows"]) for run in of_seeds]
    return [name, *cells, *map(sum, zip(*changes, strict=True))]


def draw(runs: Runs) -> None:
    plt = record.pyplot()
    figure, grid = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained", sharex=True)
    auto = [name for name in runs if "auto" in name]
    for (top, bottom), name in zip(grid.T, auto, strict=True):
        seen, target = runs[name][0]["windows"], RUNS[name]["moe.target_drop_rate"]
        ends = [window["step"] for window in seen]
        for layer in range(len(seen[0]["layers"])):
            colour = plt.get_cmap("viridis")(0.9 * layer / (len(seen[0]["layers"]) - 1))
            factors = [window["layers"][layer]["capacity_factor"] for window in seen]
            beside = [factor + 0.015 * layer for factor in factors]  # each other, not on top
            top.step(ends, beside, where="pre", color=colour, label=f"MoE layer {layer}")
            rates = [100 * share([window], "dropped", "assigned", layer) for window in seen]
            bottom.plot(ends, rates, "o-", markersize=3, color=colour)
        for fixed, colour in (("factor 1.25", "#d55e00"), ("factor 2.0", "#0072b2")):
            rates = [100 * share([w], "dropped", "assigned") for w in runs[fixed][0]["windows"]]
            bottom.plot(ends, rates, "--", color=colour, linewidth=1, label=fixed)
        bottom.axhline(100 * target, color="#777777", linewidth=1)
        bottom.annotate("target", (ends[-1], 100 * target), ha="right", va="bottom", fontsize=8)
        top.set(title=name, yticks=FACTORS, ylim=(0.9, FACTORS[-1] + 0.2))
        bottom.set(xlabel="optimizer step", ylim=(-0.2, 4 * 100 * target))
    grid[0, 0].set_ylabel("capacity factor")
    grid[1, 0].set_ylabel(f"dropped in {STEPS} steps (%)")
    for axes in (grid[0, 1], grid[1, 1]):
        axes.legend(fontsize=8)
    figure.savefig(record.RESULTS / "autopilot.png")


if __name__ == "__main__":
    main()
