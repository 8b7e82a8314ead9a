"""Texts and files from the Hugging Face hub: bounded retries, then an error one can act on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from moetrain.errors import UserError

T = TypeVar("T")

RETRY_DELAYS = (1.0, 3.0)
"""Seconds between tries."""
RETRY_BUDGET = 15.0
"""No new try after so many seconds: the hub's own client retries too."""


def fetch(
    load: Callable[[], T], subject: str, absent: str, absent_errors: tuple[type[Exception], ...]
) -> T:
    """Call `load`, and again after a failed connection, at most 1 + len(RETRY_DELAYS) times.

    A cached copy counts as success: the hub's client falls back to it when it cannot connect.

    Args:
        load: the call that may reach the network.
        subject: what is loaded, as the user wrote it, e.g. `data.tokenizer ('gpt2')`.
        absent: what to say when there is no such thing.
        absent_errors: the errors that mean so.

    Raises:
        UserError: it does not exist, cannot be reached, or is refused by the library.
    """
    # The second: no connection, and nothing cached.
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    begin = time.monotonic()
    for num_tries, delay in enumerate((*RETRY_DELAYS, None), start=1):
        try:
            return load()
        except GatedRepoError as error:
            raise UserError(
                f"{subject} is only for those who accept its terms: do so on its page of the hub, "
                "then `hf auth login`"
            ) from error
        except Exception as error:
            if isinstance(error, absent_errors) and not isinstance(error, LocalEntryNotFoundError):
                raise UserError(f"{subject} {absent} ({_first_line(error)})") from error
            if not isinstance(error, OSError) and not broke_off(error):
                raise UserError(f"{subject}: {_first_line(error)}") from error
            if delay is None or time.monotonic() - begin > RETRY_BUDGET:
                raise UserError(
                    f"{subject} could not be loaded after {num_tries} tries: "
                    f"{_first_line(error)}; check the connection; there is no file or folder of "
                    "that name"
                ) from error
            time.sleep(delay)
    raise AssertionError("the last try returns or raises")


def may_be_on_hub(name: str) -> bool:
    """Whether a name is like one of the hub, `owner/name` or `name`, and not like a path."""
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def hub_documents(
    name: str, subset: str | None, split: str, streaming: bool, field: str
) -> Iterator[Any]:
    """Yield the text column of a dataset on the hub, row by row.

    Raises:
        UserError: no such dataset, subset, split or column; the hub cannot be reached; or a
            stream breaks off.
    """
    from datasets import load_dataset
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    subject = f"data.source ('{name}', data.subset {subset or 'null'}, data.split {split})"
    rows: Any = fetch(
        lambda: load_dataset(name, subset, split=split, streaming=streaming),
        subject,
        "is neither a file or folder here nor a dataset on the hub",
        (DatasetNotFoundError, DataFilesNotFoundError),
    )
    try:
        yield from column(rows, field, subject)
    except UserError:
        raise
    except Exception as error:  # after the library's own retries
        raise UserError(f"{subject} broke off while being read: {_first_line(error)}") from error


def column(rows: Any, field: str, subject: str) -> Iterator[Any]:
    """Yield one column of a `datasets` dataset, row by row; a UserError if there is none such."""
    columns = rows.column_names or list(next(iter(rows), {field: None}))
    check_column(field, columns, subject)
    for row in rows.select_columns([field]):
        yield row[field]


def check_column(field: str, columns: list[str], subject: str) -> None:
    """Raise a UserError that lists the columns there are, unless `field` is one of them."""
    if field not in columns:
        raise UserError(f"data.field ('{field}'): {subject} has only {', '.join(columns)}")


def broke_off(error: Exception) -> bool:
    """Whether a connection broke that had been made; one that cannot be made is an OSError."""
    # Of httpx or httpx2: which of them the hub's client uses depends on its version.
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
