"""Where text comes from: a source string becomes an iterator of documents and a fingerprint.

A document is a non-empty `str`, of JSON where it is a conversation. Everything is UTF-8; text that
is not is an error that names the file and the byte, never something silently left out.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from moetrain.config import DataConfig
from moetrain.data.chat import ContentError, as_document
from moetrain.data.files import JSON_SUFFIXES, file_documents, file_kind
from moetrain.data.hub import hub_documents
from moetrain.errors import UserError
from moetrain.redact import require_whole

STDLIB = "stdlib"
STDLIB_SUFFIXES = {".py", ".rst", ".txt"}
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
    require_whole("data.source", data.source)
    if data.source == STDLIB:
        identity, texts = _stdlib()
    elif _is_local(data.source):
        identity, texts = _local(_local_files(data.source), data.field)
    else:
        where = (data.source, data.subset, data.split, data.streaming, data.field)
        identity, texts = ["hub", *where], lambda: hub_documents(*where)
    fingerprint = _sha256(json.dumps(identity).encode())
    return Source(fingerprint, lambda: islice(_documents(texts(), data), data.max_documents))


Texts = Callable[[], Iterable[Any]]


def _documents(texts: Iterable[Any], data: DataConfig) -> Iterator[str]:
    for number, value in enumerate(texts):
        if value is None:
            continue
        try:
            text = as_document(value) if data.format == "chat" else _as_text(value)
        except ContentError as error:
            raise UserError(
                f"data.field ('{data.field}') {error}, in document {number} of data.source "
                f"('{data.source}'); {error.cure}"
            ) from error
        if text:
            yield text


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ContentError(f"holds {type(value).__name__}, not text", "choose another column")
    return value


def _stdlib() -> tuple[list[Any], Texts]:
    """Python's own library, then its reference manual as `pydoc` carries it."""
    from pydoc_data.topics import topics

    identity, texts = _local(_stdlib_files(), "")
    manual = [topics[name] for name in sorted(topics)]
    identity += [_sha256(text.encode()) for text in manual]
    return identity, lambda: chain(texts(), manual)


def _stdlib_files() -> list[Path]:
    """The library, without the few files that try out other encodings than UTF-8."""
    # _sysconfigdata holds the paths of this very installation; topics are read as text instead
    return [
        path
        for path in _walk(Path(sysconfig.get_path("stdlib")))
        if path.suffix in STDLIB_SUFFIXES
        and path.name != "topics.py"
        and not path.name.startswith("_sysconfigdata")
        and _is_utf8(path)
    ]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


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


def _local(files: list[Path], field: str) -> tuple[list[Any], Texts]:
    """How each file is read and its bytes; the column counts where there are some."""
    identity = []
    for path in files:
        kind = file_kind(path)
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"data.source: cannot read {path}: {reason}") from error
        identity.append([kind, "" if kind == "text" else field, digest])
    return identity, lambda: file_documents(files, field)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
