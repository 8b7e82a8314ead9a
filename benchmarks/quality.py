"""Does sparsity pay? A MoE against a dense model of the same active size, on the same tokens.

    python benchmarks/quality.py [--steps 300] [--seeds 3]

Every token passes two of eight experts in the one and a feed-forward network as wide as two experts
in the other, so both compute the same; the MoE holds more parameters. Everything else is equal:
data, order, steps, learning rate, seeds. Runs are interleaved. Writes quality.{json,md,png} into
results/.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import harness
import record
import training

EXPERT_DIM = 256
COMMON: dict[str, Any] = {
    "model": {"dim": 128, "layers": 4, "heads": 2, "ffn_dim": 2 * EXPERT_DIM},
    "engine": {"precision": "auto"},
    "data": {"source": "stdlib", "tokenizer": "bytes", "seq_len": 256},
    "train": {"global_batch": 16, "micro_batch": 16, "lr": 3e-3, "warmup_steps": 30},
    "log": {"every": 10},
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"experts": 0},
    "MoE, 2 of 8, capacity factor 1.25": {"expert_ffn_dim": EXPERT_DIM, "capacity_factor": 1.25},
    "MoE, 2 of 8, dropless": {"expert_ffn_dim": EXPERT_DIM, "capacity_factor": None},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A MoE against a dense model of the same active size."
    )
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    options = parser.parse_args()
    harness.require_at_least(parser, options, steps=1, seeds=1)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            (model, seed): train(Path(folder), model, seed, options.steps)
            for seed in range(options.seeds)
            for model in MODELS
        }
    by_model = {m: [runs[m, seed] for seed in range(options.seeds)] for m in MODELS}
    draw(by_model)
    data = {"config": COMMON, "models": MODELS, "steps": options.steps, "runs": by_model}
    print(record.write("quality", data, report(by_model, options.steps)))


def train(folder: Path, model: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one model; returns its parameters and its evaluations."""
    name = f"{list(MODELS).index(model)}-{seed}"
    config = {
        **COMMON,
        "seed": seed,
        "moe": MODELS[model],
        "train": {**COMMON["train"], "steps": steps},
        "eval": {"every": max(1, steps // 5), "sequences": 128},
    }
    lines = training.train(folder, name, config)
    return {
        **parameters(folder / f"{name}.yaml"),
        "drop_rate": [[line["step"], line["drop_rate"]] for line in lines if "loss" in line],
        "nats_per_byte": [
            [line["step"], line["eval_nats_per_byte"]] for line in lines if "eval_loss" in line
        ],
    }


def parameters(config: Path) -> dict[str, int]:
    """Total and active parameters."""
    from moetrain import settings
    from moetrain.build import build_model
    from moetrain.data import load_tokenizer
    from moetrain.sizes import sizes

    loaded = settings.load(config)
    vocab_size = load_tokenizer(loaded.data.tokenizer).vocab_size
    counted = sizes(build_model(loaded, vocab_size))
    return {"total": counted.total, "active": counted.active}


def final(runs: list[dict[str, Any]]) -> list[float]:
    """Held-out nats per byte after the last step, one per seed."""
    return [run["nats_per_byte"][-1][1] for run in runs]


def report(by_model: dict[str, list[dict[str, Any]]], steps: int) -> str:
    dense = final(by_model["dense"])
    rows = []
    for model, runs in by_model.items():
        losses = final(runs)
        gains = [d - loss for d, loss in zip(dense, losses, strict=True)]
        rows.append(
            [
                model,
                f"{runs[0]['total']:,}",
                f"{runs[0]['active']:,}",
                f"{statistics.mean(losses):.4f}",
                f"{min(losses):.4f} to {max(losses):.4f}",
                f"{min(gains):+.4f} to {max(gains):+.4f}" if model != "dense" else "",
            ]
        )
    header = ["model", "parameters", "active", "held-out nats per byte", "range", "gain by seed"]
    tokens = steps * COMMON["train"]["global_batch"] * COMMON["data"]["seq_len"]
    return "\n".join(
        [
            "# A MoE against a dense model of the same active size",
            "",
            f"{len(dense)} seeds of {steps} steps each, {tokens:,} tokens of Python's own library. "
            "The gain is the dense model's loss less this one's, seed by seed.",
            "",
            record.table(header, rows),
            "",
            "![Held-out loss over steps](quality.png)",
        ]
    )


def draw(by_model: dict[str, list[dict[str, Any]]]) -> None:
    plt = record.pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for colour, (model, runs) in zip(
        ("#777777", "#0072b2", "#d55e00"), by_model.items(), strict=True
    ):
        for number, run in enumerate(runs):
            steps, losses = zip(*run["nats_per_byte"], strict=True)
            axes.plot(steps, losses, color=colour, label=None if number else model)
    axes.set(xlabel="optimizer step", ylabel="held-out loss (nats per byte)")
    axes.legend()
    figure.savefig(record.RESULTS / "quality.png")


if __name__ == "__main__":
    main()
