"""One rank under a launcher: trains what a file says, and writes down what came of it.

Usage: train_ways.py FOLDER, which holds `ways.pt`, a list of pairs of a config and a text.
"""

from __future__ import annotations

import sys
from pathlib import Path

import parity
import torch
import torch.distributed as dist

from moetrain.mesh import process_group


def main(folder: Path) -> None:
    """Write `NUMBER-RANK.pt` for every way."""
    with process_group() as device:
        for number, (config, text) in enumerate(torch.load(folder / "ways.pt", weights_only=False)):
            outcome = parity.on_rank(config, text, device=device)
            torch.save(outcome, folder / f"{number}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
