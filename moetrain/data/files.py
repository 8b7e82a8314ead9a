"""Documents of local files: text and JSON line by line, Parquet by the `datasets` library.

Text is opened here, because the library takes long for each file, however small.
"""

from __future__ import annotations

import glob
import gzip
import json
import logging
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from moetrain.data.hub import check_column, column
from moetrain.errors import UserError

JSON_SUFFIXES = {".jsonl", ".json"}


def file_kind(path: Path) -> Literal["text", "json", "parquet"]:
    """How a file is read, by its suffix; `.gz` may follow."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".parquet":
        return "parquet"
    return "json" if suffix in JSON_SUFFIXES else "text"


def file_documents(files: Iterable[Path], field: str) -> Iterator[Any]:
    """Yield the documents of each file: its rows' `field`, or its whole text.

    A text file is one document. Line breaks are read as `\\n`, however they are written.

    Raises:
        UserError: a file cannot be read, is damaged or not UTF-8, or has no such field.
    """
    for path in files:
        try:
            yield from READERS[file_kind(path)](path, field)
        except UnicodeDecodeError as error:
            raise UserError(
                f"data.source: {path} is not UTF-8 at byte {_first_bad_byte(path)} "
                f"({error.reason}); convert it, or leave it out with a glob"
            ) from error
        except (OSError, EOFError, zlib.error) as error:  # unreadable, or a damaged .gz
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"data.source: cannot read {path}: {reason}") from error


def _text_documents(path: Path, _field: str) -> Iterator[str]:
    with _opened(path) as file:
        yield file.read()


def _json_documents(path: Path, field: str) -> Iterator[Any]:
    # not by the library, whose JSON loader wants one type per column, also where unused
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_field(line, field, f"{path}, line {number},")


def _parquet_documents(path: Path, field: str) -> Iterator[Any]:
    import datasets
    import pyarrow

    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error, it also raises
    pattern = glob.escape(str(path))
    try:
        yield from column(datasets.IterableDataset.from_parquet(pattern), field, str(path))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"data.source: {path} is damaged: {error}") from error


READERS = {"text": _text_documents, "json": _json_documents, "parquet": _parquet_documents}


def _opened(path: Path) -> IO[str]:
    """Its text, unpacked."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _json_field(line: str, field: str, where: str) -> Any:
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


def _first_bad_byte(path: Path) -> int:
    offset = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return offset + error.start
            offset += len(line)
    return offset
