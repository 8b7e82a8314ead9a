"""Out of memory, in words: how much was asked for, for which buffer, and what makes that smaller.

The buffer follows from where the error was raised. Standard library alone: this runs where the
command line ends.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from typing import NamedTuple

MICRO_BATCH = "train.micro_batch (smaller)"
SEQ_LEN = "data.seq_len (smaller)"
CAPACITY = "moe.capacity_factor (a smaller number)"
RECOMPUTE = "engine.activation_checkpointing (full)"
BF16 = "engine.precision (bf16)"
VOCABULARY = "data.tokenizer (of a smaller vocabulary)"
MASK = "data.mask_documents (false) and data.packing (cut)"
ONE_PASS = "train.global_batch (one micro-batch per rank)"
EP = "parallel.ep (larger)"
SHARDED = "parallel.dp_replicate (1)"
RANKS = "more ranks"
BLOCKING = "checkpoint.asynchronous (false)"

_TOKENS = (MICRO_BATCH, SEQ_LEN)
_STATE = (RANKS, SHARDED, EP)


class Place(NamedTuple):
    """Where code of a module, in functions that match, takes memory for one buffer."""

    module: str
    """The module, or the package above it."""
    function: str
    """A regular expression for the beginning of its qualified name."""
    buffer: str
    less: tuple[str, ...]
    """What makes the buffer smaller, the most effective first."""


PLACES = [
    Place("torch.distributed.fsdp", ".*(reduce|post_backward)", "gradients under way",
          (EP, BF16, ONE_PASS)),
    Place("torch.distributed.fsdp", ".*(unshard|all_gather|pre_forward|pre_backward)",
          "gathered weights", (BF16, EP)),
    Place("torch.optim", "", "the optimizer step", _STATE),
    Place("moetrain.optim", "adamw", "Adam's moments", _STATE),
    Place("moetrain.moe.packed", "_gather|_pack|_filled_up",
          "slots of tokens on their way to experts", (*_TOKENS, CAPACITY, RECOMPUTE, BF16)),
    Place("moetrain.moe.packed", "", "inner activations of experts",
          (*_TOKENS, CAPACITY, RECOMPUTE, BF16)),
    Place("moetrain.moe.experts", "", "inner activations of experts",
          (*_TOKENS, CAPACITY, RECOMPUTE, BF16)),
    *(Place(f"moetrain.moe.{name}", "", "slots of tokens on their way to experts",
            (*_TOKENS, CAPACITY, RECOMPUTE, BF16))
      for name in ("dispatch", "exchange", "flights", "rows")),
    Place("moetrain.moe", "", "routing", _TOKENS),
    Place("moetrain.loss", "", "logits", (VOCABULARY, BF16, *_TOKENS)),
    Place("moetrain.model", "Attention|_attention_mask|rotate", "attention",
          (*_TOKENS, MASK, RECOMPUTE, BF16)),
    Place("moetrain.model", "initial_value|_truncated_normal", "weights", _STATE),
    Place("moetrain.model", "", "activations", (*_TOKENS, RECOMPUTE, BF16)),
    Place("moetrain.parallel", "", "weights", _STATE),
    Place("moetrain.engines", ".*backward", "gradients and activations",
          (*_TOKENS, RECOMPUTE, BF16, *_STATE)),
    Place("moetrain.engines", ".*step", "the optimizer step", _STATE),
    Place("moetrain.engines", "", "weights", _STATE),
    Place("moetrain.checkpoint.snapshot", "", "the copy that a checkpoint is saved from",
          (BLOCKING, *_STATE)),
    Place("moetrain.checkpoint.transfer", "", "a checkpoint's tensors", _STATE),
    Place("moetrain.checkpoint", "", "whole tensors", ("a host with more memory",)),
]  # fmt: skip
"""The first that fits a line of the traceback counts, from the innermost line outwards."""

_SIZES = (
    re.compile(r"tried to allocate (?P<bytes>\d+) bytes"),  # torch on the CPU
    re.compile(r"Tried to allocate (?P<text>[\d.]+ \w+)"),  # torch on a GPU
    re.compile(r"Unable to allocate (?P<text>[\d.]+ \w+) for"),  # numpy
)
_MESSAGES = re.compile(
    r"DefaultCPUAllocator: |std::bad_alloc|CUDA out of memory|CUDA error: out of memory"
    r"|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
)


def explain(error: BaseException, place: tuple[str, str] | None = None) -> str | None:
    """One message for an allocation that failed, in torch on any device or in Python; None for any
    other error.

    `place` is module and function where it happened, for an error that comes from another rank
    and so without its traceback.
    """
    if not _is_out_of_memory(error):
        return None
    buffer, less = _buffer([place] if place else list(_frames(error))[::-1])
    return (
        f"out of memory: {_size(str(error))} left for {buffer}; what takes less: {', '.join(less)} "
        "(moetrain check shows what each kind of memory comes to)"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_MESSAGES.search(str(error)))


def _size(message: str) -> str:
    for pattern in _SIZES:
        if found := pattern.search(message):
            groups = found.groupdict()
            return f"no {groups.get('text') or _in_units(int(groups['bytes']))}"
    return "nothing"


def _in_units(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def _buffer(frames: list[tuple[str, str]]) -> tuple[str, tuple[str, ...]]:
    """The buffer with the innermost function of ours, and what makes it smaller; frames come from
    the innermost outwards."""
    ours = next((f"{m}, {f}" for m, f in frames if m.partition(".")[0] == "moetrain"), "")
    for module, function in frames:
        for place in PLACES:
            is_inside = f"{module}.".startswith(f"{place.module}.")
            if is_inside and re.match(place.function, function):
                return f"{place.buffer} ({ours})", place.less
    return ours or ", ".join(frames[0]), (*_TOKENS, RANKS)


def _frames(error: BaseException) -> Iterator[tuple[str, str]]:
    """Module and qualified name of every function in the traceback, the outermost first."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield frame.f_globals.get("__name__", "?"), frame.f_code.co_qualname
