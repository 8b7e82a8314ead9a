"""Loss on held-out text, with the evaluation capacity factor and nothing drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from moetrain import restore
from moetrain.build import routing_group_tokens
from moetrain.config import Config, DataConfig, ParallelConfig
from moetrain.constraints import mesh_problems
from moetrain.data import Batch, Manifest, Prepared, Samples, Split, prepare
from moetrain.errors import UserError
from moetrain.mesh import Mesh, on_first_local_rank, process_group, rank_and_world, require_same
from moetrain.metrics import drop_rate
from moetrain.model import Output
from moetrain.moe import Draws
from moetrain.moe.layer import Mode
from moetrain.objective import Means, count, count_all, reduce, sums


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch in the device's memory."""
    return Batch(*(None if part is None else part.to(device) for part in batch))  # type: ignore[arg-type]


def forward(
    model: nn.Module, batch: Batch, mode: Mode, draws: Draws | None = None, num_ranked: int = 0
) -> Output:
    """Run the model on a batch that has targets."""
    return model(
        batch.tokens_BL,
        valid_BL=batch.valid_BL,
        targets_BL=batch.targets_BL,
        document_BL=batch.document_BL,
        mode=mode,
        draws=draws,
        num_ranked=num_ranked,
    )


def open_samples(prepared: Prepared, split: Split, config: Config) -> Samples:
    """A split of the prepared text, in sequences as configured."""
    data = config.data
    return Samples(prepared, split, data.seq_len, config.seed, data.mask_documents, data.packing)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    samples: Samples,
    sequences: int,
    config: Config,
    mesh: Mesh,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Means | None:
    """Mean loss and ledgers over `sequences` samples, evenly spaced in the text.

    None where `is_interrupted`, asked before every batch, says so, on all ranks alike.

    Every rank runs the same number of batches, filled up with padding, so that none waits for
    another in a collective. With routing groups inside sequences the result depends on no layout.
    """
    micro = config.train.micro_batch
    wanted = min(sequences, len(samples))
    chosen = [i * len(samples) // wanted for i in range(wanted)]
    parts, counts = [], []
    for first in range(0, wanted, micro * mesh.world):
        if is_interrupted():
            return None
        start = first + mesh.rank * micro
        indices = chosen[start : start + micro]
        padding = [-1] * (micro - len(indices))
        batch = on_device(samples.batch(indices + padding), mesh.device)
        parts.append(sums(forward(model, batch, "eval")))
        counts.append(count(batch, routing_group_tokens(config)))
    return reduce(parts, count_all(counts, mesh), mesh)


def nats_per_byte(loss: float, manifest: Manifest, data: DataConfig) -> float | None:
    """Held-out loss per byte of text: nats per token (ends of documents are tokens, too) times the
    tokens per byte of that text. None where some tokens are no targets."""
    if data.format == "chat" or data.packing == "whole":
        return None
    return loss * manifest.eval.tokens / manifest.eval.bytes


def run(path: Path | str, split: Split, sequences: int | None) -> None:
    """Print the loss of a checkpoint on a split of its run's data, on all ranks of the launcher.

    Experts are spread as in the run where the number of ranks allows it.
    """
    found = restore.find(path)
    config, world = found.config, rank_and_world()[1]
    ep = config.parallel.ep if world % config.parallel.ep == 0 else 1
    spread = config.model_copy(update={"parallel": ParallelConfig(ep=ep)})
    if problems := list(mesh_problems(spread, world)):
        raise UserError("\n".join(problems))
    with process_group() as device:
        mesh = Mesh(device, ep)
        prepared = on_first_local_rank(lambda: prepare(config.data))
        restore.check_tokenizer(found, prepared.tokenizer)
        _check_text(found, prepared.manifest)
        samples = open_samples(prepared, split, config)
        model = restore.model_on_mesh(found, mesh)
        means = evaluate(model, samples, sequences or config.eval.sequences, config, mesh)
        assert means is not None, "nothing interrupts it"
        if mesh.rank == 0:
            print(_summary(found, split, means, prepared.manifest))


def _check_text(found: restore.Checkpoint, manifest: Manifest) -> None:
    """Raise UserError, on every rank, unless this is the text that was trained on.

    Of another text, what is held out now may have been trained on then.
    """
    require_same("the text of data.source", manifest.fingerprint, "give every node the same files")
    if found.data_fingerprint not in (None, manifest.fingerprint):
        raise UserError(
            f"data.source ({found.config.data.source}) is no longer the text that {found.path} was "
            "trained on; put the files back (for stdlib: use the same Python)"
        )


def _summary(found: restore.Checkpoint, split: Split, means: Means, manifest: Manifest) -> str:
    text = "held-out text" if split == "eval" else "training text"
    lines = [f"{found.path.name} on {text}: {means.loss:.4f} nats per token"]
    per_byte = nats_per_byte(means.loss, manifest, found.config.data)
    if split == "eval" and per_byte is not None:
        entropy = manifest.byte_entropy
        lines.append(
            f"  {per_byte:.4f} nats per byte "
            f"(unigram model {entropy['unigram']:.4f}, bigram model {entropy['bigram']:.4f})"
        )
    if means.ledgers:
        factor = found.config.moe.eval_capacity_factor
        limit = "dropless" if factor is None else f"capacity factor {factor}"
        lines.append(f"  {100 * drop_rate(means.ledgers):.2f} % of assignments dropped ({limit})")
    return "\n".join(lines)
