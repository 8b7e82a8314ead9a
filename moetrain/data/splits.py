"""Which documents are held out for evaluation: a pure function of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Literal

from moetrain.errors import UserError

Split = Literal["train", "eval"]
SPLITS: tuple[Split, Split] = ("train", "eval")
WHOLE = 1.0
"""The fraction that holds out a whole corpus, of which nothing is trained on."""
HEAD = 256
"""Documents read ahead, so that both splits are certain to get one."""


def assign_splits(
    documents: Iterable[str], fraction: float, source: str, are_conversations: bool = False
) -> Iterator[tuple[Split, str]]:
    """Yield (`train` or `eval`, text): held out is what hashes below `fraction`.

    So a document stays in its split when others come or go, and its copies go with it. Among the
    first HEAD documents the lowest hash is always held out and the highest never. A document that
    is alone is cut: its last `fraction` of characters, one at least, is held out. A conversation
    cannot be. WHOLE holds out every document.

    Args:
        documents: the corpus, read once.
        fraction: share of the documents to hold out.
        source: where they come from, for messages.
        are_conversations: which are not cut.

    Raises:
        UserError: no text at all, or nothing that could be held out.
    """
    documents = iter(documents)
    head = list(islice(documents, HEAD))
    if fraction == WHOLE:
        if not head:
            raise UserError(f"data.source ('{source}') holds no text to evaluate on; name another")
        for text in chain(head, documents):
            yield "eval", text
        return
    if len(head) == 1 and not are_conversations:
        yield from _cut(head[0], fraction, source)
        return
    keys = [_content_key(text) for text in head]
    lowest, highest = min(keys, default=0), max(keys, default=0)
    if lowest == highest:
        raise UserError(
            f"data.source ('{source}') {_too_few(len(head))}; training and evaluation need a "
            "document each"
        )
    threshold = int(fraction * 2**64)
    for text in chain(head, documents):
        key = _content_key(text)
        held_out = key == lowest or (key < threshold and key != highest)
        yield ("eval" if held_out else "train"), text


def _too_few(number: int) -> str:
    """What is wrong with so many documents that are all the same."""
    if number == 1:
        return "holds a single conversation"
    return f"holds {number} copies of one document" if number else "holds no text"


def _cut(text: str, fraction: float, source: str) -> Iterator[tuple[Split, str]]:
    if len(text) < 2:
        raise UserError(
            f"data.source ('{source}') holds a single character; add text to train and evaluate on"
        )
    held_out = min(max(1, round(len(text) * fraction)), len(text) - 1)
    yield "train", text[:-held_out]
    yield "eval", text[-held_out:]


def _content_key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
