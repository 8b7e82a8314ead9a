"""Text to batches: corpus, tokenizer, packed shards, and a deterministic order of samples."""

from moetrain.data.cache import Prepared, prepare
from moetrain.data.chat import load_chat
from moetrain.data.corpus import open_source
from moetrain.data.samples import Batch, Samples
from moetrain.data.shards import Manifest, verify
from moetrain.data.splits import WHOLE, Split
from moetrain.data.tokenizer import (
    BYTES,
    Tokenizer,
    beside,
    bytes_as_json,
    is_on_hub,
    load_tokenizer,
    train_bpe,
)

__all__ = [
    "BYTES",
    "WHOLE",
    "Batch",
    "Manifest",
    "Prepared",
    "Samples",
    "Split",
    "Tokenizer",
    "beside",
    "bytes_as_json",
    "is_on_hub",
    "load_chat",
    "load_tokenizer",
    "open_source",
    "prepare",
    "train_bpe",
    "verify",
]
