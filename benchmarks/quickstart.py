"""Run launch/quickstart.sh and keep what it shows: the README's numbers and picture.

    python benchmarks/quickstart.py

Writes results/quickstart.{json,md} and docs/images/quickstart.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import record

from moetrain.plots import PLOTS_FOLDER
from moetrain.sinks import read_metrics

RUN = record.ROOT / "runs" / "quickstart"


def main() -> None:
    argparse.ArgumentParser(description="Keep what the quickstart shows.").parse_args()
    if RUN.exists():
        raise SystemExit(f"{RUN} exists and would be continued; remove it first")
    script = str(record.ROOT / "launch" / "quickstart.sh")
    output = subprocess.run([script], check=True, stdout=subprocess.PIPE, text=True).stdout
    print(output)
    output = output.replace(str(record.ROOT), ".")
    lines = read_metrics(RUN)
    record.write("quickstart", {"output": output, "metrics": lines}, report(lines, output))
    pictures = record.ROOT / "docs" / "images"
    pictures.mkdir(exist_ok=True)
    shutil.copy(RUN / PLOTS_FOLDER / "overview.png", pictures / "quickstart.png")


def byte_entropy() -> dict[str, float]:
    """What simpler models score on the run's text: the library of the Python that ran it."""
    code = (
        "import json, sys; from moetrain.data import prepare; from moetrain.restore import find; "
        "print(json.dumps(prepare(find(sys.argv[1]).config.data).manifest.byte_entropy))"
    )
    python = str(Path(os.environ.get("VENV", record.ROOT / ".venv")) / "bin" / "python")
    found = subprocess.run([python, "-c", code, str(RUN)], check=True, stdout=subprocess.PIPE)
    return json.loads(found.stdout)


def report(lines: list[dict[str, Any]], output: str) -> str:
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    entropy = byte_entropy()
    rows = [
        ["held-out loss, nats per byte", f"{evaluations[-1]['eval_nats_per_byte']:.4f}"],
        ["bigram model of the same text", f"{entropy['bigram']:.4f}"],
        ["unigram model", f"{entropy['unigram']:.4f}"],
        ["tokens trained on", f"{training[-1]['tokens']:,}"],
    ]
    for when, line in (("first", training[0]), ("last", training[-1])):
        rows += [
            [f"assignments dropped, {when} logged step", f"{100 * line['drop_rate']:.1f} %"],
            [f"largest expert load over the mean, {when}", f"{1 + line['max_vio']:.2f}"],
        ]
    return "\n".join(
        [
            "# The quickstart",
            "",
            record.table(["", "value"], rows),
            "",
            "![Loss, drops, throughput and load by expert](../../docs/images/quickstart.png)",
            "",
            "What it printed:",
            "",
            "```",
            output.strip(),
            "```",
        ]
    )


if __name__ == "__main__":
    main()
