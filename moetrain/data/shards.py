"""Packed tokens on disk: arrays in files of bounded size, with a checksum for every block.

A set is a folder with `manifest.json` and, for each split, its tokens (every document followed by
the end-of-text id), its document boundaries and, of conversations, which tokens carry a loss.
Checksums are verified when a block is first read, so damage is found wherever it is used, and
opening a large set costs nothing.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from moetrain.data.splits import SPLITS, Split
from moetrain.errors import UserError

FORMAT = 1
"""To be raised when what is written for the same input changes; part of the cache's key."""
BLOCK_BYTES = 1 << 20
SHARD_BYTES = 256 << 20
OFFSET_DTYPE, LOSS_DTYPE = "<i8", "|u1"
MANIFEST = "manifest.json"


class Record(BaseModel):
    """Part of the manifest: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(Record):
    """One file: its name inside the folder, its size, and SHA-256 of each BLOCK_BYTES of it."""

    name: str
    bytes: int
    blocks: list[str]


class SplitManifest(Record):
    """One split: how much it holds, and its files."""

    tokens: int
    """Ids, one end of text per document among them."""
    documents: int
    bytes: int
    """UTF-8 bytes of the documents; of conversations, of their answers."""
    token_files: list[FileEntry]
    offset_files: list[FileEntry]
    """int64: where each document begins in the tokens, and at last the number of tokens."""
    loss_files: list[FileEntry] = []
    """uint8: 1 for tokens that carry a loss, else 0; no files where all do."""


class Manifest(Record):
    """What a prepared set holds."""

    source: str
    """`data.source` as it was written when the set was prepared."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: int
    eos_id: int
    dtype: str
    """Of the tokens: <u2 where the vocabulary fits, else <u4."""
    byte_entropy: dict[str, float]
    """`unigram`, `bigram`: what these models, counted on the training text, score on the held-out
    text: nats spent on its bytes and on the ends of documents, over the number of bytes. Empty
    where there is no training text."""
    train: SplitManifest
    eval: SplitManifest

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of all tokens: equal exactly where the tokens are."""
        digest = hashlib.sha256(f"{self.dtype} {self.vocab_size} {self.eos_id}".encode())
        for split in (self.train, self.eval):
            for entry in split.token_files + split.offset_files + split.loss_files:
                digest.update("".join(entry.blocks).encode() + b"\n")
        return digest.hexdigest()


class Encoded(NamedTuple):
    """A document in tokens."""

    ids: np.ndarray
    """Integers, without the end of text that follows."""
    num_bytes: int
    """UTF-8 bytes of its text; of a conversation, of the answers."""
    in_loss: np.ndarray | None = None
    """bool: of each id, and of the end of text, whether it carries a loss; None where all do, which
    must be so of all documents or of none."""


class BlockWriter:
    """Writes bytes into files `STEM-00000.bin`, … of at most `file_bytes`, block by block."""

    def __init__(self, folder: Path, stem: str, file_bytes: int = SHARD_BYTES) -> None:
        assert file_bytes % BLOCK_BYTES == 0, file_bytes
        self.folder, self.stem, self.file_bytes = folder, stem, file_bytes
        self.entries: list[FileEntry] = []
        self._pending = bytearray()
        self._blocks: list[str] = []
        self._file = None

    def write(self, content: bytes) -> None:
        """Append some bytes."""
        self._pending += content
        while len(self._pending) >= BLOCK_BYTES:
            self._write_block(self._pending[:BLOCK_BYTES])
            del self._pending[:BLOCK_BYTES]

    def close(self) -> list[FileEntry]:
        """Write what is left, make it durable, and describe the files."""
        if self._pending:
            self._write_block(self._pending)
        if self._file:
            self._close_file()
        return self.entries

    def _write_block(self, block: bytes | bytearray) -> None:
        if self._file is None:
            name = f"{self.stem}-{len(self.entries):05d}.bin"
            self._file = (self.folder / name).open("wb")
        self._file.write(block)
        self._blocks.append(hashlib.sha256(block).hexdigest())
        if len(self._blocks) * BLOCK_BYTES == self.file_bytes:
            self._close_file()

    def _close_file(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        name, size = Path(self._file.name).name, self._file.tell()
        self._file.close()
        self.entries.append(FileEntry(name=name, bytes=size, blocks=self._blocks))
        self._file, self._blocks = None, []


class SplitWriter:
    """Writes the tokens of one split, its document boundaries, and what carries a loss."""

    def __init__(
        self,
        folder: Path,
        split: Split,
        vocab_size: int,
        eos_id: int,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder, self.split = folder, split
        self.vocab_size, self.eos_id = vocab_size, eos_id
        self.dtype = token_dtype(vocab_size)
        self.offsets = array("q", [0])
        self.bytes = 0
        self._tokens = BlockWriter(folder, f"{split}-tokens", shard_bytes)
        self._in_loss = BlockWriter(folder, f"{split}-loss", shard_bytes)

    def add(self, ids: np.ndarray, num_bytes: int, in_loss: np.ndarray | None = None) -> None:
        """Append one document, the parts of `Encoded`, and the end of text after it.

        Nothing is written for a document without ids (some tokenizers drop white space).

        Raises:
            UserError: an id that the vocabulary does not have.
        """
        if not len(ids):
            return
        if (worst := int(ids.max())) >= self.vocab_size:
            raise UserError(
                f"data.tokenizer yields id {worst} in {self.split} document "
                f"{len(self.offsets) - 1}; its vocabulary has {self.vocab_size}"
            )
        self._tokens.write(ids.astype(self.dtype).tobytes())
        self._tokens.write(np.array(self.eos_id, dtype=self.dtype).tobytes())
        if in_loss is not None:
            assert len(in_loss) == len(ids) + 1, (len(in_loss), len(ids))
            self._in_loss.write(in_loss.astype(LOSS_DTYPE).tobytes())
        self.offsets.append(self.offsets[-1] + len(ids) + 1)
        self.bytes += num_bytes

    def close(self) -> SplitManifest:
        """Finish the files and describe them.

        Raises:
            UserError: no document had a token.
        """
        if len(self.offsets) == 1:
            raise UserError(f"data.tokenizer yields no token for any {self.split} document")
        offsets = BlockWriter(self.folder, f"{self.split}-offsets")
        offsets.write(np.array(self.offsets, dtype=OFFSET_DTYPE).tobytes())
        return SplitManifest(
            tokens=self.offsets[-1],
            documents=len(self.offsets) - 1,
            bytes=self.bytes,
            token_files=self._tokens.close(),
            offset_files=offsets.close(),
            loss_files=self._in_loss.close(),
        )


class BlockArray:
    """A one-dimensional array on disk, read through memory maps; each block is verified once."""

    def __init__(
        self, folder: Path, entries: list[FileEntry], dtype: str, limit: int | None = None
    ) -> None:
        """Open the files; values must lie below `limit`, where one is given.

        Raises:
            UserError: a file is missing or has another size than the manifest says.
        """
        self.paths = [folder / entry.name for entry in entries]
        self.entries, self.dtype, self.limit = entries, np.dtype(dtype), limit
        for path, entry in zip(self.paths, entries, strict=True):
            _check_size(path, entry.bytes)
        self._maps = [np.memmap(path, dtype=self.dtype, mode="r") for path in self.paths]
        self._verified = [np.zeros(len(entry.blocks), dtype=bool) for entry in entries]
        # Every file but the last has as many; an array of nothing has no file.
        self._file_len = len(self._maps[0]) if self._maps else 0
        self._block_len = BLOCK_BYTES // self.dtype.itemsize

    def __len__(self) -> int:
        return sum(len(file) for file in self._maps)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Values [start, stop) as int64; a range may cross files.

        Raises:
            UserError: a block's checksum is wrong, or a value is not below the limit.
        """
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        pieces = [np.empty(0, dtype=np.int64)]
        while start < stop:
            file, first = divmod(start, self._file_len)
            last = min(first + stop - start, self._file_len)
            self._verify(file, first, last)
            pieces.append(self._maps[file][first:last].astype(np.int64))
            start += last - first
        return np.concatenate(pieces)

    def verify(self) -> None:
        """Read every block not read yet; raises as `read` does."""
        for file, values in enumerate(self._maps):
            self._verify(file, 0, len(values))

    def _verify(self, file: int, first: int, last: int) -> None:
        for block in range(first // self._block_len, (last - 1) // self._block_len + 1):
            if not self._verified[file][block]:
                self._verify_block(file, block)
                self._verified[file][block] = True

    def _verify_block(self, file: int, block: int) -> None:
        begin = block * self._block_len
        values = self._maps[file][begin : begin + self._block_len]
        offset = begin * self.dtype.itemsize
        if hashlib.sha256(values.tobytes()).hexdigest() != self.entries[file].blocks[block]:
            raise _damaged(
                self.paths[file],
                f"the checksum of bytes {offset} to {offset + values.nbytes} is wrong",
            )
        if self.limit is not None and values.max() >= self.limit:
            where = int(np.argmax(values >= self.limit))
            raise _damaged(
                self.paths[file],
                f"token id {values[where]} at byte {offset + where * self.dtype.itemsize} is not "
                f"in the vocabulary of {self.limit}",
            )


def token_dtype(vocab_size: int) -> str:
    """The smallest of <u2 and <u4 that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, durably."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` and check that every file it names is there, with its size.

    Raises:
        UserError: the manifest is damaged, or a file is missing, truncated or too long.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error
    for entry in _entries(manifest):
        _check_size(folder / entry.name, entry.bytes)
    return manifest


def open_tokens(folder: Path, manifest: Manifest, split: Split) -> BlockArray:
    """Tokens of `train` or `eval`."""
    files = getattr(manifest, split).token_files
    return BlockArray(folder, files, manifest.dtype, manifest.vocab_size)


def open_offsets(folder: Path, manifest: Manifest, split: Split) -> BlockArray:
    """Document boundaries of `train` or `eval`."""
    return BlockArray(folder, getattr(manifest, split).offset_files, OFFSET_DTYPE)


def open_loss(folder: Path, manifest: Manifest, split: Split) -> BlockArray | None:
    """Which tokens of `train` or `eval` carry a loss; None where all do."""
    files = getattr(manifest, split).loss_files
    return BlockArray(folder, files, LOSS_DTYPE) if files else None


def verify(folder: Path) -> None:
    """Read a whole set: every size, every checksum, every id.

    Raises:
        UserError: names the first damaged file and the offset in it.
    """
    manifest = read_manifest(folder)
    for split in SPLITS:
        open_tokens(folder, manifest, split).verify()
        open_offsets(folder, manifest, split).verify()
        if in_loss := open_loss(folder, manifest, split):
            in_loss.verify()


def _entries(manifest: Manifest) -> Iterator[FileEntry]:
    for split in (manifest.train, manifest.eval):
        yield from split.token_files
        yield from split.offset_files
        yield from split.loss_files


def _check_size(path: Path, size: int) -> None:
    actual = path.stat().st_size if path.is_file() else None
    if actual is None:
        raise _damaged(path, "the file is missing")
    if actual != size:
        raise _damaged(path, f"it ends at byte {actual}, not at {size}")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"prepared data is damaged: {path}: {what}; delete {path.parent} to prepare it again"
    )
