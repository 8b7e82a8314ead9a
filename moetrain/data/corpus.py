"""Where text comes from: a source string becomes an iterator of documents and a fingerprint.

A document is a non-empty `str`. Everything is UTF-8; text that is not is an error that names the
file and the byte, never something silently left out.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from moetrain.config import DataConfig
from moetrain.data.hub import check_column, hub_documents
from moetrain.errors import UserError

STDLIB = "stdlib"
STDLIB_SUFFIXES = {".py", ".rst", ".txt"}
JSON_SUFFIXES = {".jsonl", ".json"}
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
KNOWN_SUFFIXES = {*JSON_SUFFIXES, ".parquet", ".txt", ".md", ".gz"}


@dataclass(frozen=True)
class Source:
    """A corpus that can be read from its beginning any number of times."""

    fingerprint: str
    """SHA-256 of the content (of a hub dataset: of its name, subset, split and column)."""
    documents: Callable[[], Iterator[str]]
    """Start reading: every non-empty document, always in the same order."""


def open_source(data: DataConfig) -> Source:
    """Read `data.source` as `stdlib`, as local files, or as the name of a dataset on the hub.

    Local is what exists on disk, has glob characters, a known suffix, or cannot be a hub name.
    The fingerprint of local files covers their bytes and their order, not their names, so a moved
    folder is the same corpus. A hub dataset is known by name alone: what was prepared once is
    used, offline too, until its cache is deleted.

    Raises:
        UserError: nothing is there. Bad content is reported while `documents()` is read.
    """
    if data.source == STDLIB:
        fingerprint, texts = _hash_texts(_stdlib_texts()), _stdlib_texts
    elif _is_local(data.source):
        files = _local_files(data.source)
        fingerprint = _hash_files(files, data.field)
        texts = partial(_local_texts, files, data.field)
    else:
        where = (data.source, data.subset, data.split, data.streaming, data.field)
        fingerprint = _sha256(json.dumps(["hub", *where]).encode())
        texts = partial(hub_documents, *where)
    return Source(fingerprint, lambda: islice(_documents(texts(), data), data.max_documents))


def _documents(texts: Iterable[str | None], data: DataConfig) -> Iterator[str]:
    for number, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"data.field ('{data.field}') holds {type(text).__name__}, not text, in document "
                f"{number} of data.source ('{data.source}'); choose another column"
            )
        if text:
            yield text


def _stdlib_texts() -> Iterator[str]:
    """Python's own library, then its reference manual as `pydoc` carries it.

    The few files that are not UTF-8 are the interpreter's own tests of other encodings: left out.
    """
    from pydoc_data.topics import topics

    for path in _stdlib_files(Path(sysconfig.get_path("stdlib"))):
        try:
            yield path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
    yield from (topics[name] for name in sorted(topics))


def _stdlib_files(root: Path) -> list[Path]:
    # _sysconfigdata holds the paths of this very installation; topics are read as text instead
    return [
        path
        for path in _walk(root)
        if path.suffix in STDLIB_SUFFIXES
        and path.name != "topics.py"
        and not path.name.startswith("_sysconfigdata")
    ]


def _is_local(source: str) -> bool:
    path = Path(source).expanduser()
    return (
        path.exists()
        or path.suffix in KNOWN_SUFFIXES
        or glob.has_magic(source)
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
    )


def _local_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        files = _walk(path)
    elif path.is_file():
        files = [path]
    else:
        found = (Path(name) for name in glob.glob(str(path), recursive=True))
        files = sorted(name for name in found if name.is_file())
    if not files:
        state = "holds no file" if path.is_dir() else "does not exist, or matches no file"
        raise UserError(f"data.source ('{source}') {state}; name a file, a folder or a glob")
    return files


def _walk(root: Path) -> list[Path]:
    """Files under `root` in the order of their relative names; nothing hidden or installed."""
    named = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name[0] != "." and name not in SKIPPED_FOLDERS]
        for path in (Path(folder, name) for name in files if name[0] != "."):
            if path.is_file():  # a pipe would hang
                named[path.relative_to(root).as_posix()] = path
    return [named[name] for name in sorted(named)]


def _local_texts(files: list[Path], field: str) -> Iterator[str | None]:
    for path in files:
        try:
            yield from READERS[_kind(path)](path, field)
        except (OSError, EOFError, zlib.error) as error:  # unreadable, or a damaged .gz
            raise UserError(f"data.source: cannot read {path}: {error}") from error


def _kind(path: Path) -> str:
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".parquet":
        return "parquet"
    return "json" if suffix in JSON_SUFFIXES else "text"


def _text_documents(path: Path, _field: str) -> Iterator[str]:
    with _open(path) as file:
        yield _decode(file.read(), path, 0)


def _json_documents(path: Path, field: str) -> Iterator[str | None]:
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_field(_decode(line, path, offset), field, f"{path}, line {number},")
            offset += len(line)


def _json_field(line: str, field: str, where: str) -> str | None:
    try:
        row = json.loads(line.strip())
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise UserError(f"data.source: {where} must be one JSON object ({reason})") from error
    if not isinstance(row, dict):
        raise UserError(f"data.source: {where} must be one JSON object, not {type(row).__name__}")
    check_column(field, list(row), where)
    text = row[field]
    if isinstance(text, str) and not _is_encodable(text):
        raise UserError(f"data.source: {where} holds half a surrogate pair in '{field}'")
    return text


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_documents(path: Path, field: str) -> Iterator[str | None]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            check_column(field, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"data.source: {path} is damaged: {error}") from error


READERS = {"text": _text_documents, "json": _json_documents, "parquet": _parquet_documents}


def _open(path: Path):
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _decode(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.source: {path} is not UTF-8 at byte {offset + error.start} ({error.reason}); "
            "convert it, or leave it out with a glob"
        ) from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hash_texts(texts: Iterable[str]) -> str:
    return _sha256("".join(_sha256(text.encode()) for text in texts).encode())


def _hash_files(files: list[Path], field: str) -> str:
    """SHA-256 over how each file is read and its bytes; the column counts where there are some."""
    parts = []
    for path in files:
        kind = _kind(path)
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"data.source: cannot read {path}: {error}") from error
        parts.append([kind, "" if kind == "text" else field, digest])
    return _sha256(json.dumps(parts).encode())
