"""A rank of a run under test: `moetrain`, with a journal of what it loaded, began and read.

    python benchmarks/soaking/worker.py JOURNALS train CONFIG [--section.field value ...]

One JSON object a line in JOURNALS/rank-N.jsonl, written out at once, so that a kill loses none:

    {"event": "loaded", "step": 20, "pieces": {NAME: [[offsets, sizes, crc32], ...]}}
    {"event": "begin", "step": 21}
    {"event": "read", "samples": [[index, crc32 of its tokens], ...]}
    {"event": "end", "step": 21}
    {"event": "evaluate"}
    {"event": "evaluated"}
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from moetrain import checkpoint, cli, report, train
from moetrain.data import Batch, Samples


def main(journals: Path, args: Sequence[str]) -> int:
    """Run a command of `moetrain` as this rank; returns its exit code."""
    path = journals / f"rank-{os.environ.get('RANK', '0')}.jsonl"
    with path.open("a", buffering=1, encoding="utf-8") as file, watched(file):
        return cli.main(args)


@contextmanager
def watched(file: TextIO) -> Iterator[None]:
    """While it is open, what training does is noted; no pictures, which would take longer."""

    def note(event: str, **values: Any) -> None:
        file.write(json.dumps({"event": event, **values}) + "\n")

    load_latest, train_step = checkpoint.load_latest, train.train_step
    evaluate, batch = train.evaluate, Samples.batch

    def noting_load(run_dir: Path, tensors: dict[str, Tensor], **options: Any) -> Any:
        loaded = load_latest(run_dir, tensors, **options)
        if loaded is not None:
            step = loaded[1]["position"]["step"]
            note(
                "loaded", step=step, pieces={name: pieces(name, tensors[name]) for name in tensors}
            )
        return loaded

    def noting_step(run: Any, position: Any, *others: Any) -> Any:
        note("begin", step=position.step + 1)
        result = train_step(run, position, *others)
        note("end", step=position.step + 1)
        return result

    def noting_evaluation(*args: Any, **options: Any) -> Any:
        note("evaluate")
        means = evaluate(*args, **options)
        note("evaluated")
        return means

    def noting_batch(samples: Samples, indices: Sequence[int]) -> Batch:
        made = batch(samples, indices)
        if samples.split == "train":
            crcs = [crc(tokens_L) for tokens_L in made.tokens_BL]
            note("read", samples=list(zip(indices, crcs, strict=True)))
        return made

    with ExitStack() as patches:
        for owner, name, noting in (
            (checkpoint, "load_latest", noting_load),
            (train, "train_step", noting_step),
            (train, "evaluate", noting_evaluation),
            (Samples, "batch", noting_batch),
            (report, "write_plots", lambda *_: []),
        ):
            patches.enter_context(mock.patch.object(owner, name, noting))
        yield


def pieces(name: str, tensor: Tensor) -> list[tuple[list[int], list[int], int]]:
    """Offsets, sizes and CRC of what this rank holds of a tensor."""
    if not hasattr(tensor, "__create_chunk_list__"):
        return [([0] * tensor.ndim, list(tensor.shape), crc(tensor))]
    held: Any = tensor
    return [
        (
            list(chunk.offsets),
            list(chunk.sizes),
            crc(held.__get_tensor_shard__(MetadataIndex(name, chunk.offsets))),
        )
        for chunk in held.__create_chunk_list__()
        if chunk.sizes.numel()
    ]


def crc(tensor: Tensor) -> int:
    """CRC-32 of the elements' bytes."""
    return zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
