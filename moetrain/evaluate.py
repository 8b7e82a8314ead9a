"""Loss on held-out text and on others, with the evaluation capacity factor and nothing drawn at
random."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from moetrain import restore
from moetrain.build import routing_group_tokens
from moetrain.config import Config, DataConfig, ParallelConfig
from moetrain.constraints import mesh_problems
from moetrain.data import WHOLE, Batch, Manifest, Prepared, Samples, Split, prepare
from moetrain.errors import UserError
from moetrain.mesh import Mesh, on_first_local_rank, process_group, rank_and_world, require_same
from moetrain.metrics import drop_rate
from moetrain.model import Output
from moetrain.moe import Draws, Ledger
from moetrain.moe.layer import Mode
from moetrain.objective import Means, add, count, count_all, reduce, sums
from moetrain.redact import redact
from moetrain.tables import print_table


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
    total, counts = None, []
    for first in range(0, wanted, micro * mesh.world):
        if is_interrupted():
            return None
        start = first + mesh.rank * micro
        indices = chosen[start : start + micro]
        padding = [-1] * (micro - len(indices))
        batch = on_device(samples.batch(indices + padding), mesh.device)
        part = sums(forward(model, batch, "eval"))
        total = part if total is None else add(total, part)  # a text may be of many batches
        counts.append(count(batch, routing_group_tokens(config)))
    assert total is not None, "there is no empty text"
    return reduce([total], count_all(counts, mesh), mesh)


def nats_per_byte(loss: float, manifest: Manifest, data: DataConfig) -> float | None:
    """Held-out loss per byte of text: nats per token (ends of documents are tokens, too) times the
    tokens per byte of that text. None where some tokens are no targets."""
    if data.format == "chat" or data.packing == "whole":
        return None
    return loss * manifest.eval.tokens / manifest.eval.bytes


def perplexity(loss: float) -> float:
    """e to the nats per token; infinite where that is past the largest float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Score(NamedTuple):
    """What a model made of a text."""

    targets: int
    """Tokens predicted."""
    nats: float
    """Of all of them."""
    num_bytes: float | None
    """That they stand for, at the mean of the text; None where not all tokens are predicted."""
    ledgers: tuple[Ledger, ...]
    """One per MoE layer."""

    @classmethod
    def of(cls, means: Means, manifest: Manifest, predicts_all: bool) -> Score:
        """On the held-out documents of a prepared text, of which all tokens may be targets."""
        share = means.targets / manifest.eval.tokens
        is_all = predicts_all and not manifest.eval.loss_files
        num_bytes = manifest.eval.bytes * share if is_all else None
        return cls(means.targets, means.loss * means.targets, num_bytes, means.ledgers)

    def row(self) -> tuple[int, str, str, str, str]:
        """What COLUMNS says."""
        loss = self.nats / self.targets
        return (
            self.targets,
            f"{loss:.4f}",
            f"{perplexity(loss):#.5g}",
            f"{self.nats / self.num_bytes:.4f}" if self.num_bytes else "",
            f"{100 * drop_rate(self.ledgers):.2f} %" if self.ledgers else "",
        )


COLUMNS = ("source", "tokens", "nats per token", "perplexity", "nats per byte", "dropped")
TOGETHER = "all together"


def together(scores: Sequence[Score]) -> Score:
    """Of several texts: a token counts the same in each."""
    targets, nats, num_bytes, ledgers = zip(*scores, strict=True)
    in_all = None if None in num_bytes else sum(num_bytes)
    return Score(sum(targets), sum(nats), in_all, tuple(chain(*ledgers)))


def run(path: Path | str, split: Split, sequences: int | None) -> None:
    """Print the loss of a checkpoint on a split of its run's data, on all ranks of the launcher.

    Experts are spread as in the run where the number of ranks allows it.
    """
    found = restore.find(path)
    with _joined(found) as mesh:
        (prepared,) = _prepared(found, [found.config.data])
        _check_text(found, prepared.manifest)
        means = _Reader(found, mesh).read(prepared, split, sequences or found.config.eval.sequences)
        if mesh.rank == 0:
            print(_summary(found, split, means, prepared.manifest))


def run_on(path: Path | str, texts: Sequence[DataConfig], sequences: int | None) -> None:
    """Print a table of what a checkpoint scores on some texts, on all ranks of the launcher."""
    found = restore.find(path)
    with _joined(found) as mesh:
        scores = score(found, texts, sequences, mesh)
        if mesh.rank == 0:
            _print_scores(found, [redact(text.source) for text in texts], scores)


def score(
    found: restore.Checkpoint, texts: Sequence[DataConfig], sequences: int | None, mesh: Mesh
) -> list[Score]:
    """What a checkpoint makes of each text, the same on every rank and layout.

    A text is read to its end, or as many `sequences` of it, with the tokenizer, the length of
    sequences and the document masks of the run. `texts` say what to read and how, and where
    prepared tokens are kept, if not where those of the run are.
    """
    ready = _prepared(found, [_whole(found.config.data, text) for text in texts])
    reader = _Reader(found, mesh)
    is_cut = found.config.data.packing == "cut"
    return [
        Score.of(reader.read(prepared, "eval", sequences), prepared.manifest, is_cut)
        for prepared in ready
    ]


def _whole(run: DataConfig, text: DataConfig) -> DataConfig:
    """Another text, all of it held out, as the run's own is read."""
    own = {
        "tokenizer": run.tokenizer,
        "chat_template": text.chat_template or run.chat_template,
        "cache": text.cache or run.cache,
        "eval_fraction": WHOLE,
    }
    return text.model_copy(update=own)


@contextmanager
def _joined(found: restore.Checkpoint) -> Iterator[Mesh]:
    """The ranks of the launcher, with experts spread as in the run where their number allows it."""
    world = rank_and_world()[1]
    ep = found.config.parallel.ep if world % found.config.parallel.ep == 0 else 1
    spread = found.config.model_copy(update={"parallel": ParallelConfig(ep=ep)})
    if problems := list(mesh_problems(spread, world)):
        raise UserError("\n".join(problems))
    with process_group() as device:
        yield Mesh(device, ep)


def _prepared(found: restore.Checkpoint, texts: Sequence[DataConfig]) -> list[Prepared]:
    """Each text in the tokens of the checkpoint, which every rank has alike."""
    ready = on_first_local_rank(lambda: [prepare(text) for text in texts])
    for prepared in ready:
        restore.check_tokenizer(found, prepared.tokenizer)
        require_same(
            "the text of data.source",
            prepared.manifest.fingerprint,
            "give every node the same files",
        )
    return ready


class _Reader:
    """A checkpoint's model on a mesh, to read texts with."""

    def __init__(self, found: restore.Checkpoint, mesh: Mesh) -> None:
        self.config, self.mesh = found.config, mesh
        self.model = restore.model_on_mesh(found, mesh)

    def read(self, prepared: Prepared, split: Split, sequences: int | None) -> Means:
        """Means over so many sequences of a split, or over all of them."""
        samples = open_samples(prepared, split, self.config)
        means = evaluate(self.model, samples, sequences or len(samples), self.config, self.mesh)
        assert means is not None, "nothing interrupts it"
        length, source = self.config.data.seq_len, prepared.manifest.source
        if samples.num_shortened and self.mesh.rank == 0:
            warnings.warn(
                f"data.seq_len ({length}) of the run leaves out the end of "
                f"{samples.num_shortened:,} documents of {source}, which are longer",
                stacklevel=2,
            )
        if not means.targets:
            raise UserError(
                f"{source} has no answer within data.seq_len ({length}) of the sequences read; "
                "read more of them, or shorten what is asked"
            )
        return means


def _check_text(found: restore.Checkpoint, manifest: Manifest) -> None:
    """Raise UserError unless this is the text that was trained on.

    Of another text, what is held out now may have been trained on then.
    """
    if found.data_fingerprint not in (None, manifest.fingerprint):
        raise UserError(
            f"data.source ({found.config.data.source}) is no longer the text that {found.path} was "
            "trained on; put the files back (for stdlib: use the same Python), or name another "
            "text with --source"
        )


def _limit(config: Config) -> str:
    factor = config.moe.eval_capacity_factor
    return "dropless" if factor is None else f"capacity factor {factor}"


def _summary(found: restore.Checkpoint, split: Split, means: Means, manifest: Manifest) -> str:
    text = "held-out text" if split == "eval" else "training text"
    lines = [
        f"{found.path.name} on {text}: {means.loss:.4f} nats per token "
        f"(perplexity {perplexity(means.loss):#.5g})"
    ]
    per_byte = nats_per_byte(means.loss, manifest, found.config.data)
    if split == "eval" and per_byte is not None:
        entropy = manifest.byte_entropy
        lines.append(
            f"  {per_byte:.4f} nats per byte "
            f"(unigram model {entropy['unigram']:.4f}, bigram model {entropy['bigram']:.4f})"
        )
    if means.ledgers:
        dropped = 100 * drop_rate(means.ledgers)
        lines.append(f"  {dropped:.2f} % of assignments dropped ({_limit(found.config)})")
    return "\n".join(lines)


def _print_scores(
    found: restore.Checkpoint, sources: Sequence[str], scores: Sequence[Score]
) -> None:
    """One row for each text and, of several, one for all."""
    is_sparse = bool(scores[0].ledgers)
    rows = [(name, *score.row()) for name, score in zip(sources, scores, strict=True)]
    if len(rows) > 1:
        rows.append((TOGETHER, *together(scores).row()))
    print(f"{found.path.name}" + (f", {_limit(found.config)}" if is_sparse else ""))
    width = len(COLUMNS) if is_sparse else len(COLUMNS) - 1
    print_table(COLUMNS[:width], (row[:width] for row in rows))
