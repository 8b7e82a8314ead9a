"""Does bf16 train what fp32 trains? The quickstart in both, from the same weights on the same text.

    python benchmarks/precision.py [--steps 300]

The yardstick is a third run, in fp32 with a learning rate that is larger by 2^-9, half of the most
that bf16 rounds by: how far so small a change, carried along by training, takes two runs apart.
Each run has two processes. Writes results/precision.{json,md}; exit code 1 where bf16 leaves the
band.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import harness
import record
import training
import yaml

CONFIG = "configs/quickstart.yaml"
LR = yaml.safe_load((record.ROOT / CONFIG).read_text())["train"]["lr"]
BAND = 0.02
"""Nats, at every evaluation."""
RUNS: dict[str, dict[str, Any]] = {
    "fp32": {"engine.precision": "fp32"},
    "bf16": {"engine.precision": "bf16"},
    "fp32, nudged": {"engine.precision": "fp32", "train.lr": LR * (1 + 2**-9)},
}
LOSSES = {"loss": ("log.every", 5), "eval_loss": ("eval.every", 25)}
"""Each with what says how often it is told."""
Curve = list[tuple[int, float]]
"""Pairs of a step and a loss in nats per target."""


def main() -> None:
    parser = argparse.ArgumentParser(description="bf16 against fp32 on the quickstart.")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    options = parser.parse_args()
    harness.require_at_least(parser, options, steps=LOSSES["eval_loss"][1])
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: train(Path(folder), name, options.steps) for name in RUNS}
    gaps = {name: compare(run, runs["fp32"]) for name, run in runs.items() if name != "fp32"}
    data = {"config": CONFIG, "flags": RUNS, "steps": options.steps, "band": BAND}
    print(record.write("precision", {**data, "gaps": gaps, "runs": runs}, report(runs, gaps)))
    if gaps["bf16"]["eval_loss"]["largest"] > BAND:
        raise SystemExit(f"bf16 leaves the band of {BAND} nats")


def train(folder: Path, name: str, steps: int) -> dict[str, Curve]:
    """Train on two ranks; the losses of logged steps, and held-out ones."""
    flags = {**RUNS[name], "train.steps": steps, "checkpoint.every": 0, **dict(LOSSES.values())}
    run = str(list(RUNS).index(name))
    lines = training.train(folder, run, record.ROOT / CONFIG, flags, ranks=2)
    return {key: [(line["step"], line[key]) for line in lines if key in line] for key in LOSSES}


def compare(run: dict[str, Curve], exact: dict[str, Curve]) -> dict[str, dict[str, float]]:
    """Largest and mean distance of each curve from the exact one, and the distance at the end."""
    found = {}
    for key, curve in run.items():
        pairs = zip(curve, exact[key], strict=True)
        gaps = [loss - other for (_, loss), (_, other) in pairs]
        sizes = [abs(gap) for gap in gaps]
        found[key] = {
            "largest": max(sizes),
            "mean": sum(sizes) / len(sizes),
            "at the end": gaps[-1],
        }
    return found


def report(runs: dict[str, dict[str, Curve]], gaps: dict[str, Any]) -> str:
    names = {"loss": "training", "eval_loss": "held out"}
    what = {key: f"{names[key]}, every {every} steps" for key, (_, every) in LOSSES.items()}
    summary = []
    for name, of_run in gaps.items():
        for key, words in what.items():
            largest, mean, last = of_run[key].values()
            summary.append([name, words, f"{largest:.4f}", f"{mean:.4f}", f"{last:+.4f}"])
    held_out = [
        [step, *(f"{loss:.4f}" for _, loss in losses)]
        for losses in zip(*(run["eval_loss"] for run in runs.values()), strict=True)
        for step in [losses[0][0]]
    ]
    within = "within" if gaps["bf16"]["eval_loss"]["largest"] <= BAND else "**not** within"
    return "\n".join(
        [
            "# bf16 against fp32 on the quickstart",
            "",
            f"bf16 is {within} {BAND} nats of fp32 at every evaluation. Same weights at the start, "
            "same text, same draws; distances from fp32 in nats per target. The last run is fp32 "
            "again, with a learning rate that is larger by 2^-9.",
            "",
            record.table(["run", "loss", "largest distance", "mean", "at the end"], summary),
            "",
            "Held out:",
            "",
            record.table(["step", *runs], held_out),
        ]
    )


if __name__ == "__main__":
    main()
