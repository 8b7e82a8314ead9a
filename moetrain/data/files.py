"""Documents of local files, which the `datasets` library opens, unpacks, decodes and streams.

What it reports without saying where is looked up here, so that an error names file, line and byte.
"""

from __future__ import annotations

import glob
import gzip
import json
import logging
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from moetrain.data.hub import check_column, column
from moetrain.errors import UserError

JSON_SUFFIXES = {".jsonl", ".json"}


def file_kind(path: Path) -> Literal["text", "json", "parquet"]:
    """How a file is read, by its suffix; `.gz` may follow."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".parquet":
        return "parquet"
    return "json" if suffix in JSON_SUFFIXES else "text"


def file_documents(files: Iterable[Path], field: str) -> Iterator[str | None]:
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
            raise UserError(f"data.source: cannot read {path}: {error}") from error


def _text_documents(path: Path, _field: str) -> Iterator[str]:
    return _text_rows(path, "document")


def _json_documents(path: Path, field: str) -> Iterator[str | None]:
    # as lines of text: the library's JSON loader wants one type per column, also where unused
    for number, line in enumerate(_text_rows(path, "line"), start=1):
        if line.strip():
            yield _json_field(line, field, f"{path}, line {number},")


def _parquet_documents(path: Path, field: str) -> Iterator[str | None]:
    import pyarrow

    try:
        yield from column(_library().from_parquet(_literal(path)), field, str(path))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"data.source: {path} is damaged: {error}") from error


READERS = {"text": _text_documents, "json": _json_documents, "parquet": _parquet_documents}


def _text_rows(path: Path, sample_by: Literal["document", "line"]) -> Iterator[str]:
    rows = _library().from_text(_literal(path), sample_by=sample_by)
    return (row["text"] for row in rows)


def _library():
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error, it also raises
    return datasets.IterableDataset


def _literal(path: Path) -> str:
    """The path as the pattern that matches it alone."""
    return glob.escape(str(path))


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
