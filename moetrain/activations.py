"""Bytes that a forward pass keeps for its backward pass, measured on tensors without memory."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from moetrain.build import build_model
from moetrain.config import Config
from moetrain.loss import CHUNK_TOKENS
from moetrain.model import Transformer
from moetrain.moe import Draws, MoE, Router

COMPUTED_IN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""What each `engine.precision` multiplies in."""


class Activations(NamedTuple):
    """Bytes of one micro-batch on one rank."""

    outside: int
    """Kept outside the blocks."""
    blocks: tuple[int, ...]
    """Kept by each block."""
    logits: int
    """Those that exist at one time: as computed, their softmax and its gradient in fp32 at least;
    they are computed anew in the backward pass."""


def activations(config: Config, vocab_size: int) -> Activations:
    """Measure one block of each kind, which stands for all of its kind.

    `vocab_size` is the tokenizer's. Expert parallelism changes nothing: a rank receives as many
    rows as it sends, provided that dropless experts are evenly loaded.
    """
    model = build_model(config, vocab_size)
    kinds = ["dense" if block.moe is None else "sparse" for block in model.blocks]
    examples = {kind: model.blocks[kinds.index(kind)] for kind in set(kinds)}
    model.blocks = nn.ModuleList(examples.values())
    outside, *measured = kept_bytes(model, config)
    of_kind = dict(zip(examples, measured, strict=True))
    return Activations(outside, tuple(of_kind[kind] for kind in kinds), _logits(model, config))


def kept_bytes(model: Transformer, config: Config) -> list[int]:
    """Bytes that autograd keeps outside the blocks, then in every block; weights do not count.

    Runs the model on a micro-batch, which turns its weights into tensors without memory.
    """
    with FakeTensorMode():
        _fill(model, COMPUTED_IN[config.engine.precision])
        keeper = _Keeper(model)
        tokens_BL = torch.zeros(config.train.micro_batch, config.data.seq_len, dtype=torch.int64)
        document_BL = tokens_BL.clone() if config.data.mask_documents else None
        draws = Draws(torch.zeros((), dtype=torch.int64), tokens_BL.flatten())
        with torch.autograd.graph.saved_tensors_hooks(keeper.keep, lambda tensor: tensor):
            model(
                tokens_BL,
                targets_BL=tokens_BL,
                document_BL=document_BL,
                mode="train",
                draws=draws,
            )
    return keeper.num_bytes()


def _fill(model: Transformer, compute: torch.dtype) -> None:
    """Weights as a rank computes with them."""
    for module in model.modules():
        dtype = torch.float32 if isinstance(module, Router) else compute
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=dtype)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        if isinstance(module, MoE):  # dropless counts rows on the host; factor 1 has as many
            module.factors = {"train": module.factors["train"] or 1.0}


class _Keeper:
    """Adds up the memory under saved tensors, each once, by the block that was first to save it.

    What a block is given beside its input is shared by all of them and belongs to none.
    """

    def __init__(self, model: Transformer):
        self._ignored = {_memory(weight) for weight in model.parameters()}
        self._shared: set[int] = set()
        self._kept: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self._place, self._num_places = 0, 1 + len(model.blocks)
        for place, block in enumerate(model.blocks, start=1):
            block.register_forward_pre_hook(partial(self._enter, place))
            block.register_forward_hook(self._leave)

    def keep(self, tensor: Tensor) -> Tensor:
        """Note a tensor that autograd saves."""
        memory = _memory(tensor)
        if memory not in self._ignored:
            place = 0 if memory in self._shared else self._place
            # Holds the storage, so that no other gets its address.
            self._kept.setdefault(memory, (place, tensor.untyped_storage()))
        return tensor

    def num_bytes(self) -> list[int]:
        """Bytes kept outside the blocks, then by every block."""
        totals = [0] * self._num_places
        for place, storage in self._kept.values():
            totals[place] += storage.nbytes()
        return totals

    def _enter(self, place: int, _block: nn.Module, args: tuple[Any, ...]) -> None:
        self._place = place
        others = tree_leaves(args[1:])
        self._shared |= {_memory(other) for other in others if isinstance(other, Tensor)}

    def _leave(self, *_: object) -> None:
        self._place = 0


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _logits(model: Transformer, config: Config) -> int:
    compute = COMPUTED_IN[config.engine.precision]
    wide = torch.promote_types(compute, torch.float32)
    tokens = min(CHUNK_TOKENS, config.train.micro_batch * config.data.seq_len)
    return tokens * model.embedding.num_embeddings * (compute.itemsize + 2 * wide.itemsize)
