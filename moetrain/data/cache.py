"""From a source and a tokenizer to a cached set of packed tokens, built once and shared.

The folder of a set is named by a hash of everything it depends on. It is written under another
name and renamed when it is complete, so what a killed process leaves behind is never used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moetrain.config import DataConfig
from moetrain.data.chat import Chat, load_chat
from moetrain.data.corpus import Source, open_source
from moetrain.data.entropy import byte_entropy, count_pairs
from moetrain.data.shards import (
    FORMAT,
    Encoded,
    Manifest,
    SplitManifest,
    SplitWriter,
    read_manifest,
    token_dtype,
    write_manifest,
)
from moetrain.data.splits import SPLITS, WHOLE, Split, assign_splits
from moetrain.data.tokenizer import Tokenizer, load_tokenizer
from moetrain.errors import UserError
from moetrain.redact import redact, require_whole
from moetrain.saying import forgiving, say

BATCH_LENGTH = 1 << 22
"""Characters tokenized at once."""
LINE_SECONDS = 10.0
"""Between progress lines where there is no terminal."""
NOTHING = SplitManifest(tokens=0, documents=0, bytes=0, token_files=[], offset_files=[])
"""The training split of a corpus that is held out as a whole."""


@dataclass(frozen=True)
class Prepared:
    """A set of tokens that is ready to be read."""

    directory: Path
    tokenizer: Tokenizer
    manifest: Manifest
    chat: Chat | None = None
    """Of conversations, the template that they were written by."""


def prepare(data: DataConfig) -> Prepared:
    """Find the prepared tokens of `data`, or build them; any number of processes may call this.

    One process builds while the others wait on a file lock, which its end releases however it
    ends. Rebuilt when the content of the source, the tokenizer, `data.field`, `data.max_documents`,
    `data.eval_fraction` or, of conversations, the chat template changes.

    Raises:
        UserError: the source, the tokenizer or the cache cannot be used; the message says why.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    chat = load_chat(data, tokenizer) if data.format == "chat" else None
    source = open_source(data)
    require_whole("data.cache", str(data.cache))
    root = cache_root(data.cache)
    directory = root / _key(data, source, tokenizer, chat)
    try:
        if not directory.exists():
            with _lock(directory):
                if not directory.exists():
                    _build(data, source, tokenizer, chat, directory)
    except OSError as error:
        raise UserError(f"data.cache ({root}) cannot be written: {error}") from error
    return Prepared(directory, tokenizer, read_manifest(directory), chat)


def cache_root(cache: Path | None) -> Path:
    """`data.cache`, else $XDG_CACHE_HOME/moetrain, else ~/.cache/moetrain."""
    if cache is not None:
        return cache.expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moetrain"


def _key(data: DataConfig, source: Source, tokenizer: Tokenizer, chat: Chat | None) -> str:
    parts = [FORMAT, source.fingerprint, tokenizer.fingerprint]
    parts += [data.max_documents, data.eval_fraction]
    parts += [] if chat is None else [chat.fingerprint]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process to prepare the data")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    data: DataConfig, source: Source, tokenizer: Tokenizer, chat: Chat | None, directory: Path
) -> None:
    for abandoned in directory.parent.glob(f"{directory.name}.*.partial"):
        shutil.rmtree(abandoned, ignore_errors=True)
    partial = Path(
        tempfile.mkdtemp(prefix=f"{directory.name}.", suffix=".partial", dir=directory.parent)
    )
    try:
        partial.chmod(0o755)  # mkdtemp keeps others out; a cache may be shared
        documents = assign_splits(
            source.documents(), data.eval_fraction, data.source, are_conversations=chat is not None
        )
        splits = ("eval",) if data.eval_fraction == WHOLE else SPLITS
        manifest = _write_splits(documents, splits, data.source, tokenizer, chat, partial)
        write_manifest(partial, manifest)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_splits(
    documents: Iterator[tuple[Split, str]],
    splits: Sequence[Split],
    source: str,
    tokenizer: Tokenizer,
    chat: Chat | None,
    folder: Path,
) -> Manifest:
    size = (tokenizer.vocab_size, tokenizer.eos_id)
    writers = {split: SplitWriter(folder, split, *size) for split in splits}
    pairs = {split: count_pairs([]) for split in splits}
    with _progress() as advance:
        for batch in _batches(documents):
            texts = [text for _, text in batch]
            encoded = _encoded(texts, tokenizer) if chat is None else map(chat.encode, texts)
            num_tokens = 0
            for (split, _), parts in zip(batch, encoded, strict=True):
                writers[split].add(*parts)
                num_tokens += len(parts.ids)
            for split in splits if chat is None else ():
                pairs[split] += count_pairs(text for name, text in batch if name == split)
            advance(len(batch), num_tokens)
    return Manifest(
        source=redact(source),
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype=token_dtype(tokenizer.vocab_size),
        byte_entropy=byte_entropy(pairs["train"], pairs["eval"])
        if chat is None and "train" in pairs
        else {},
        train=writers["train"].close() if "train" in writers else NOTHING,
        eval=writers["eval"].close(),
    )


def _encoded(texts: list[str], tokenizer: Tokenizer) -> Iterator[Encoded]:
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        yield Encoded(ids, len(text.encode()))


def _batches(documents: Iterator[tuple[Split, str]]) -> Iterator[list[tuple[Split, str]]]:
    batch, length = [], 0
    for document in documents:
        batch.append(document)
        length += len(document[1])
        if length >= BATCH_LENGTH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


@contextmanager
def _progress():
    """Yield `advance(documents, tokens)`: a live line on a terminal, else one now and then."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(file=forgiving(sys.stderr))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("preparing data")
        total, printed = [0, 0], time.monotonic()

        def advance(num_documents: int, num_tokens: int) -> None:
            nonlocal printed
            total[0] += num_documents
            total[1] += num_tokens
            line = f"preparing data: {total[0]:,} documents, {total[1]:,} tokens"
            bar.update(task, description=line)
            if not console.is_terminal and time.monotonic() - printed > LINE_SECONDS:
                printed = time.monotonic()
                say(line)

        yield advance
