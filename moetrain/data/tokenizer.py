"""Tokenizers: raw bytes, any `tokenizer.json`, and training a byte-level BPE.

Text never produces the end-of-text id: a special token spelled out in a document is plain text. It
is the template of a conversation alone that may write special tokens (`encode_special`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from moetrain.data.hub import broke_off, fetch, may_be_on_hub
from moetrain.errors import UserError
from moetrain.redact import require_whole

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"
END_TOKENS = (
    END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>",
    "[SEP]",
)  # fmt: skip
"""Names of the token that ends a document, the first one found counts."""
PIECE_LENGTH = 1 << 16
"""Longest text, in characters, that a tokenizer is given at once: it spends some 200 bytes of
memory on each character, and a long unbroken word costs more than its pieces."""
PIECES_AT_ONCE = 128


class Tokenizer(Protocol):
    """Turns text into ids below `vocab_size` and back."""

    ids: Sequence[int]
    """Every id there is, ascending; in a tokenizer.json there may be gaps."""
    vocab_size: int
    """The last id + 1."""
    eos_id: int
    """Ends every document; also fills padding, which no loss or routing ever sees."""
    fingerprint: str
    """Changes exactly when the mapping may have changed."""
    special: Mapping[str, int]
    """Special tokens, as they are spelled, with their ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, integer arrays, without any special token."""
        ...

    def encode_special(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text in which special tokens, spelled out, are such, and the character that each
        id begins at: int64 arrays."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; special tokens vanish, halves of a character become U+FFFD."""
        ...

    def save(self, path: Path) -> None:
        """Write what `load_tokenizer` needs, if anything, to a file."""
        ...


class ByteTokenizer:
    """One id per UTF-8 byte, and 256 for the end of a document."""

    ids: Sequence[int] = range(257)
    vocab_size = 257
    eos_id = 256
    fingerprint = BYTES
    special: Mapping[str, int] = MappingProxyType({END_OF_TEXT: 256})

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """UTF-8 bytes of each text, uint8."""
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def encode_special(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Bytes, and 256 for every end of text spelled out."""
        ids, starts, place = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
        for number, piece in enumerate(text.split(END_OF_TEXT)):
            if number:
                ids.append(np.array([self.eos_id]))
                starts.append(np.array([place]))
                place += len(END_OF_TEXT)
            (byte,) = self.encode_batch([piece])
            begins_character = (byte & 0xC0) != 0x80
            ids.append(byte.astype(np.int64))
            starts.append(place + np.cumsum(begins_character) - 1)
            place += len(piece)
        return np.concatenate(ids), np.concatenate(starts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; 256 vanishes, halves of a character become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, path: Path) -> None:
        """Nothing to write."""


def bytes_as_json() -> str:
    """The content of a tokenizer.json that gives the ids of `ByteTokenizer`, for other programs."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    # The library writes bytes as characters: those that can be seen as themselves, others from 256.
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    alphabet = {chr(byte): byte for byte in seen}
    alphabet |= {chr(256 + place): byte for place, byte in enumerate(others)}
    inner: Any = Inner(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])
    return inner.to_str()


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library, read from a `tokenizer.json`."""

    def __init__(self, path: Path, subject: str) -> None:
        """Read `path`; `subject` names the setting in messages.

        Raises:
            UserError: no tokenizer there, or none of its special tokens ends a text.
        """
        from tokenizers import Tokenizer as Inner

        try:
            content = path.read_bytes()
            inner: Any = Inner.from_buffer(content)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{subject}: {path} is no tokenizer.json: {error}") from error
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # spelled-out special tokens are plain text
        self.inner = inner
        self.ids: Sequence[int] = sorted(set(inner.get_vocab().values()))
        self.vocab_size = self.ids[-1] + 1
        self.eos_id = _find_eos(inner, subject)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.special: Mapping[str, int] = _special(inner)
        self._content = content

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32; a text past PIECE_LENGTH is encoded in pieces."""
        pieces = [list(_pieces(text)) for text in texts]
        ids = self._encode(piece for text in pieces for piece in text)
        return [np.concatenate([next(ids) for _ in text]) for text in pieces]

    def encode_special(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids as the library gives them for the whole text, and where they begin."""
        self.inner.encode_special_tokens = False
        try:
            encoding = self.inner.encode(text, add_special_tokens=False)
        finally:
            self.inner.encode_special_tokens = True
        starts = [start for start, _ in encoding.offsets]
        return np.array(encoding.ids, dtype=np.int64), np.array(starts, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; special tokens vanish, halves of a character become U+FFFD."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Write the tokenizer.json as it was read."""
        path.write_bytes(self._content)

    def _encode(self, pieces: Iterator[str]) -> Iterator[np.ndarray]:
        while group := list(islice(pieces, PIECES_AT_ONCE)):
            for encoding in self.inner.encode_batch_fast(group, add_special_tokens=False):
                yield np.array(encoding.ids, dtype=np.uint32)


def load_tokenizer(name: str) -> Tokenizer:
    """Load `bytes`, the path of a tokenizer.json or of the folder that holds it, or a hub name.

    Raises:
        UserError: nothing there, not a tokenizer, or no end-of-text token.
    """
    if name == BYTES:
        return ByteTokenizer()
    require_whole("data.tokenizer", name)
    subject, path = f"data.tokenizer ('{name}')", _path(name)
    if is_on_hub(name):
        path = _download(name, subject)
    elif not path.is_file():
        raise UserError(f"{subject}: there is no file {path}")
    return JsonTokenizer(path, subject)


def is_on_hub(name: str) -> bool:
    """Whether `load_tokenizer` would look for it on the hub."""
    path = _path(name)
    is_path = path.suffix == ".json" or not may_be_on_hub(name)
    return name != BYTES and not is_path and not path.is_file()


def beside(name: str, file: str) -> Path | None:
    """A file that lies where the tokenizer `name` (as data.tokenizer) is, or None."""
    if name == BYTES:
        return None
    if is_on_hub(name):
        return _download_if_there(name, file)
    path = _path(name).parent / file
    return path if path.is_file() else None


def _path(name: str) -> Path:
    path = Path(name).expanduser()
    return path / "tokenizer.json" if path.is_dir() else path


def train_bpe(documents: Iterable[str], vocab_size: int, out: Path) -> JsonTokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016) and write it to `out`, whole or not at all.

    Args:
        documents: texts to learn merges from.
        vocab_size: size of the vocabulary: 256 bytes, the end of text, and merges.
        out: path of the tokenizer.json to write; its folder is made.

    Raises:
        UserError: vocab_size below 257, or too little text for so many merges.
    """
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"vocab_size ({vocab_size}) must be at least 257: 256 bytes, end of text")
    inner: Any = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator((piece for text in documents for piece in _pieces(text)), trainer)
    if (reached := inner.get_vocab_size()) < vocab_size:
        raise UserError(
            f"vocab_size ({vocab_size}) is more than this text has merges for; "
            f"try {reached}, or more text"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.write_text(inner.to_str(), encoding="utf-8")
    os.replace(partial, out)
    return JsonTokenizer(out, f"tokenizer ('{out}')")


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text after a newline, else a space, else anywhere; '' is one empty piece."""
    begin = 0
    while len(text) - begin > PIECE_LENGTH:
        end = begin + PIECE_LENGTH
        cut = text.rfind("\n", begin, end) + 1 or text.rfind(" ", begin, end) + 1 or end
        yield text[begin:cut]
        begin = cut
    yield text[begin:]


def _download(name: str, subject: str) -> Path:
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    return fetch(
        lambda: _cached(name, "tokenizer.json"),
        subject,
        f"is neither '{BYTES}', nor a file here, nor a model with a tokenizer.json on the hub",
        (RepositoryNotFoundError, EntryNotFoundError),
    )


def _download_if_there(name: str, file: str) -> Path | None:
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def load() -> Path | None:
        try:
            return _cached(name, file)
        except LocalEntryNotFoundError:
            if try_to_load_from_cache(name, file) is _CACHED_NO_EXIST:
                return None  # as it was found when there was a connection
            raise
        except EntryNotFoundError:
            return None

    return fetch(load, f"{file} of data.tokenizer ('{name}')", "is not on the hub", ())


def _cached(name: str, file: str) -> Path:
    """A file of the hub, or its copy here where the connection breaks."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        return Path(hf_hub_download(name, file))
    except Exception as error:
        copy = try_to_load_from_cache(name, file) if broke_off(error) else None
        if isinstance(copy, str):
            return Path(copy)
        raise


def _special(inner: Any) -> dict[str, int]:
    added = inner.get_added_tokens_decoder()
    return {token.content: index for index, token in added.items() if token.special}


def _find_eos(inner: Any, subject: str) -> int:
    special = _special(inner)
    for name in END_TOKENS:
        if name in special:
            return special[name]
    raise UserError(
        f"{subject} has no special token that ends a text, only {sorted(special)}; "
        f"add one of {', '.join(END_TOKENS)}"
    )
