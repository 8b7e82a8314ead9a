"""What keeps experts evenly used: balance losses and biases against nothing, on the same tokens.

    python benchmarks/balance.py [--steps 200] [--seeds 2] [--only TEXT]

The pair at the top is Table 6 of Shazeer et al. (1701.06538) in small: the noisy gate without and
with its importance and load losses. The others are what one chooses between today. Everything else
is equal: data, order, steps, learning rate, seeds. Runs are interleaved. Writes balance.{json,md}
into results/.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import record
import training

COMMON: dict[str, Any] = {
    "model": {"dim": 64, "layers": 2, "heads": 2, "ffn_dim": 128},
    "data": {"source": "stdlib", "tokenizer": "bytes", "seq_len": 128},
    "train": {"global_batch": 16, "micro_batch": 16, "lr": 3e-3, "warmup_steps": 20},
    "log": {"every": 1},
}
EXPERTS: dict[str, Any] = {
    "experts": 8,
    "top_k": 2,
    "expert_ffn_dim": 64,
    "capacity_factor": 1.25,
    "eval_capacity_factor": 2.0,
    "z_loss_coef": 0.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "noisy top-2, no loss": {"router": "noisy_topk", "balance_coef": 0.0},
    "noisy top-2, importance and load 0.1": {"router": "noisy_topk", "balance_coef": 0.1},
    "top-2, no loss": {"router": "topk", "balance_coef": 0.0},
    "top-2, loss 0.01 by sequence": {"router": "topk", "balance_coef": 0.01},
    "top-2, loss 0.01 by batch": {
        "router": "topk",
        "balance_coef": 0.01,
        "balance_scope": "batch",
    },
    "top-2, loss 0.1 by sequence": {"router": "topk", "balance_coef": 0.1},
    "top-2, loss 0.1 by batch": {"router": "topk", "balance_coef": 0.1, "balance_scope": "batch"},
    "gshard, loss 0.01 by sequence": {"router": "gshard", "balance_coef": 0.01},
    "switch, no loss": {"router": "switch", "top_k": 1, "balance_coef": 0.0},
    "switch, loss 0.01 by sequence": {"router": "switch", "top_k": 1, "balance_coef": 0.01},
    "sigmoid, nothing": {"router": "sigmoid", "balance_coef": 0.0, "bias_update_rate": 0.0},
    "sigmoid, bias 0.001": {"router": "sigmoid", "balance_coef": 0.0, "bias_update_rate": 0.001},
    "sigmoid, bias 0.01": {"router": "sigmoid", "balance_coef": 0.0, "bias_update_rate": 0.01},
}
MEASURES = {
    "max/mean load": ".2f",
    "dropped": ".1%",
    "slots empty": ".1%",
    "dead experts": ".2f",
    "held-out nats per byte": ".4f",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What keeps experts evenly used.")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each variant")
    parser.add_argument(
        "--only", default="", help="just the variants whose name holds this; printed, not kept"
    )
    options = parser.parse_args()
    harness.require_at_least(parser, options, steps=1, seeds=1)
    names = [name for name in VARIANTS if options.only in name]
    if not names:
        parser.error(f"--only ({options.only}) is in no name; try one of {list(VARIANTS)}")
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            (name, seed): train(Path(folder), name, seed, options.steps)
            for seed in range(options.seeds)
            for name in names
        }
    by_name = {name: [runs[name, seed] for seed in range(options.seeds)] for name in names}
    data = {
        "config": {**COMMON, "moe": EXPERTS},
        "variants": {name: VARIANTS[name] for name in names},
        "steps": options.steps,
        "measured_over_steps": tail(options.steps),
        "runs": by_name,
    }
    page = report(by_name, options.steps)
    print(record.write("balance", data, page) if len(names) == len(VARIANTS) else page)


def tail(steps: int) -> int:
    """Last steps that a measure is the mean of: a tenth of the run."""
    return max(1, steps // 10)


def train(folder: Path, name: str, seed: int, steps: int) -> dict[str, float]:
    """Train one variant; returns MEASURES of its end."""
    config = {
        **COMMON,
        "seed": seed,
        "moe": {**EXPERTS, **VARIANTS[name]},
        "train": {**COMMON["train"], "steps": steps},
        "eval": {"every": steps, "sequences": 128},
    }
    lines = training.train(folder, f"{list(VARIANTS).index(name)}-{seed}", config)
    return measures(lines, steps)


def measures(lines: Sequence[dict[str, Any]], steps: int) -> dict[str, float]:
    """Means over layers and over the last tenth of the steps, each step with its own load."""
    last = [line for line in lines if "loss" in line][-tail(steps) :]
    layers = [layer for line in last for layer in line["layers"]]
    (held_out,) = (line["eval_nats_per_byte"] for line in lines if "eval_loss" in line)
    return {
        "max/mean load": 1 + statistics.mean(layer["max_vio"] for layer in layers),
        "dropped": statistics.mean(line["drop_rate"] for line in last),
        "slots empty": statistics.mean(line["padding_waste"] for line in last),
        "dead experts": statistics.mean(line["dead_experts"] for line in last),
        "held-out nats per byte": held_out,
    }


def report(by_name: dict[str, list[dict[str, float]]], steps: int) -> str:
    rows = [
        [
            name,
            *(
                harness.mean_and_range([run[measure] for run in runs], form)
                for measure, form in MEASURES.items()
            ),
        ]
        for name, runs in by_name.items()
    ]
    seeds = len(next(iter(by_name.values())))
    tokens = steps * COMMON["train"]["global_batch"] * COMMON["data"]["seq_len"]
    return "\n".join(
        [
            "# What keeps experts evenly used",
            "",
            f"{seeds} seeds of {steps} steps each, {tokens:,} tokens of Python's own library; "
            f"2 layers of {EXPERTS['experts']} experts, capacity factor "
            f"{EXPERTS['capacity_factor']} in sequences of {COMMON['data']['seq_len']} tokens. "
            f"Load (before drops), drops and empty slots are means over layers and the last "
            f"{tail(steps)} steps, each step with its own load; dead experts are summed over "
            "layers. In brackets, the lowest and highest seed.",
            "",
            record.table(["gate and balance", *MEASURES], rows),
        ]
    )


if __name__ == "__main__":
    main()
