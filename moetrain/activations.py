"""Bytes that a forward pass keeps for its backward pass, measured on tensors without memory."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import TypeIs

from moetrain.build import build_model
from moetrain.config import Config, ParallelConfig
from moetrain.loss import CHUNK_TOKENS
from moetrain.model import Transformer
from moetrain.moe import Draws, LayerOutput, MoE, Router
from moetrain.parallel import COSTLY, Recompute, apply_recompute
from moetrain.precision import compute_dtype


class Activations(NamedTuple):
    """Bytes of one micro-batch on one rank."""

    outside: int
    """Kept outside the blocks."""
    blocks: tuple[int, ...]
    """Kept by each block."""
    recomputed: int
    """What a block makes again for its backward pass, at most: one at a time has it."""
    logits: int
    """Those that exist at one time: as computed, and their softmax in fp32 at least, which becomes
    their gradient."""


def activations(config: Config, vocab_size: int) -> Activations:
    """Measure one block of each kind, which stands for all of its kind.

    `vocab_size` is the tokenizer's. A rank receives as many rows as it sends, provided that
    dropless experts are evenly loaded; what expert parallelism adds to that is `_sent_bytes`.
    """
    recompute = config.engine.activation_checkpointing
    model = build_model(config, vocab_size)
    kinds = ["dense" if block.moe is None else "sparse" for block in model.blocks]
    different = sorted(set(kinds))
    model.blocks = nn.ModuleList(model.blocks[kinds.index(kind)] for kind in different)
    outside, *kept = kept_bytes(deepcopy(model), config, recompute)
    whole = kept_bytes(model, config, "none")[1:] if recompute != "none" else kept
    of_kind = dict(zip(different, kept, strict=True))
    return Activations(
        outside,
        tuple(of_kind[kind] for kind in kinds),
        max(all_of_it - part for all_of_it, part in zip(whole, kept, strict=True)),
        _logits(model, config),
    )


def kept_bytes(model: Transformer, config: Config, recompute: Recompute) -> list[int]:
    """Bytes that are kept outside the blocks, then in every block; weights do not count.

    Runs the model on a micro-batch, which turns its weights into tensors without memory.
    """
    apply_recompute(model, recompute)
    with FakeTensorMode():
        _fill(model, compute_dtype(config.engine))
        keeper = _Keeper(model, recompute, config.parallel)
        tokens_BL = torch.zeros(config.train.micro_batch, config.data.seq_len, dtype=torch.int64)
        data = config.data
        has_mask = data.mask_documents or data.packing == "whole"
        document_BL = tokens_BL.clone() if has_mask else None
        draws = Draws(torch.zeros((), dtype=torch.int64), tokens_BL.flatten())
        hooks = torch.autograd.graph.saved_tensors_hooks(keeper.keep, lambda tensor: tensor)
        with hooks, keeper:
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
            value = torch.empty(weight.shape, dtype=dtype)
            setattr(module, name, nn.Parameter(value, weight.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        if isinstance(module, MoE):  # dropless counts rows on the host; factor 1 has as many
            module.factors = {"train": module.factors["train"] or 1.0}


class _Keeper(TorchDispatchMode):
    """Adds up the memory that is kept, each tensor once, by the block that was first to keep it.

    What autograd saves comes through `keep`. What recomputation keeps by other means is found here:
    decisions of routers, and with `selective` the products in blocks and the rows that were sent.
    What a block is given beside its input is shared by all of them and belongs to none.
    """

    def __init__(self, model: Transformer, recompute: Recompute, parallel: ParallelConfig):
        super().__init__()
        self._recompute: Recompute = recompute
        self._parallel = parallel
        self._ignored = {_memory(weight) for weight in model.parameters()}
        self._shared: set[int] = set()
        self._kept: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self._place, self._sent = 0, [0] * (1 + len(model.blocks))
        for place, block in enumerate(model.blocks, start=1):
            block.register_forward_pre_hook(partial(self._enter, place))
            block.register_forward_hook(self._leave)
            if isinstance(block.moe, MoE):
                block.moe.register_forward_hook(self._note_what_moe_keeps)

    def keep(self, tensor: Tensor) -> Tensor:
        """Note a tensor that is kept."""
        memory = _memory(tensor)
        if memory not in self._ignored:
            place = 0 if memory in self._shared else self._place
            # Holds the storage, so that no other gets its address.
            self._kept.setdefault(memory, (place, tensor.untyped_storage()))
        return tensor

    def num_bytes(self) -> list[int]:
        """Bytes kept outside the blocks, then by every block."""
        totals = list(self._sent)
        for place, storage in self._kept.values():
            totals[place] += storage.nbytes()
        return totals

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and keep what it returns where recomputation would."""
        result = func(*args, **(kwargs or {}))
        if self._place and self._recompute == "selective" and func in COSTLY:
            self._keep_all(result)
        return result

    def _enter(self, place: int, _block: nn.Module, args: tuple[Any, ...]) -> None:
        self._place = place
        self._shared |= {_memory(leaf) for leaf in tree_leaves(args[1:]) if _is_tensor(leaf)}

    def _leave(self, *_: object) -> None:
        self._place = 0

    def _note_what_moe_keeps(self, _moe: nn.Module, _args: object, output: LayerOutput) -> None:
        if self._recompute != "none":
            self._keep_all(output.decisions)
        self._sent[self._place] += _sent_bytes(self._recompute, self._parallel, output)

    def _keep_all(self, tree: Any) -> None:
        for leaf in tree_leaves(tree):
            if _is_tensor(leaf):
                self.keep(leaf)


def _sent_bytes(recompute: Recompute, parallel: ParallelConfig, output: LayerOutput) -> int:
    """What a layer keeps beside what it would keep on one rank, by `moetrain.moe.dispatch`: the
    rows that it received, if those are kept, and with all_gather the plans of all ranks."""
    y_BLD, plan = output.y_BLD, output.decisions.plan
    wide = torch.promote_types(y_BLD.dtype, torch.float32).itemsize
    keeps_rows, ep = recompute == "selective", parallel.ep
    if ep == 1 or recompute == "full":
        return 0
    if parallel.dispatch == "all_gather":  # tokens of all ranks, and back their shares of sums
        plans = plan.row_TK.numel() * (plan.row_TK.itemsize + wide)
        if not keeps_rows:
            return (ep - 1) * plans
        return ep * (y_BLD.numel() * (y_BLD.itemsize + wide) + plans + plan.count_E.nbytes)
    hops = 2 if parallel.dispatch == "two_level" else 1
    num_rows = plan.source_R.numel()
    return 2 * hops * num_rows * y_BLD.shape[-1] * y_BLD.itemsize * keeps_rows


def _is_tensor(leaf: object) -> TypeIs[Tensor]:
    return isinstance(leaf, Tensor)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _logits(model: Transformer, config: Config) -> int:
    compute = compute_dtype(config.engine)
    wide = torch.promote_types(compute, torch.float32)
    tokens = min(CHUNK_TOKENS, config.train.micro_batch * config.data.seq_len)
    return tokens * model.embedding.num_embeddings * (compute.itemsize + wide.itemsize)
