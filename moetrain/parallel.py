"""Parallelism, applied to a single-device model from outside, in this order:

1. expert parallelism: expert weights become DTensors sharded by expert over `ep`, and every MoE
   layer gets a dispatcher;
2. compilation of the regions between what FSDP2 gathers;
3. recomputation of whole blocks in the backward pass;
4. FSDP2: dense weights over all data ranks, experts over the ranks that hold the same ones. Routers
   stay whole on every rank, in fp32: they are small, and a gather each would cost more;
5. storage: the meta-device model gets memory, and its initial values.

Gradients are summed, not averaged: the loss is already divided by the global number of targets, so
dense and expert weights need no divisor, whatever the number of ranks that hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moetrain.mesh import Mesh
from moetrain.model import Block, Memory, Transformer, initial_value
from moetrain.moe import (
    AllGather,
    AllToAll,
    Decisions,
    Dispatcher,
    Experts,
    LayerOutput,
    Local,
    MoE,
    Packed,
    Router,
)
from moetrain.moe.layer import Mode
from moetrain.precision import Precision

Recompute = Literal["none", "selective", "full"]
Dispatch = Literal["all_to_all", "two_level", "all_gather"]


def parallelize(
    model: Transformer,
    mesh: Mesh,
    precision: Precision,
    seed: int,
    recompute: Recompute = "none",
    compiled: bool = False,
) -> Transformer:
    """Spread a model built on the meta device over the mesh and initialise it, in place."""
    if precision == "fp64":
        model.double()
    if mesh.ep > 1:
        connect_experts(model, mesh)
        _shard_experts(model, mesh)
    if compiled:
        compile_regions(model, recompute)
    apply_recompute(model, recompute)
    _apply_fsdp(model, mesh, precision)
    model.to_empty(device=mesh.device)
    _initialise(model, mesh, seed)
    return model


def connect_experts(
    model: nn.Module,
    mesh: Mesh,
    dispatch: Dispatch = "all_to_all",
    overlap_chunks: int = 1,
    compiled: bool = False,
) -> None:
    """Choose how tokens reach the experts, in every layer."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    needs_rows = compiled or any(layer.experts.dropout for layer in layers)
    dispatcher = _dispatcher(mesh, dispatch, overlap_chunks, needs_rows)
    for layer in layers:
        layer.dispatcher = dispatcher


def local_dispatcher(device: torch.device, needs_rows: bool = False) -> Dispatcher:
    """The fastest where all experts are on this rank; a compiled graph `needs_rows` of equal shape,
    and expert dropout the keys that lie in them."""
    return Local() if needs_rows or device.type != "cpu" else Packed()


def _dispatcher(
    mesh: Mesh, dispatch: Dispatch, overlap_chunks: int, needs_rows: bool
) -> Dispatcher:
    if mesh.ep == 1:
        return local_dispatcher(mesh.device, needs_rows)
    if dispatch == "all_gather":
        return AllGather(mesh.expert_parallel.get_group())
    if dispatch == "two_level":
        inside, across = mesh.inside_node.get_group(), mesh.across_nodes.get_group()
        return AllToAll(inside, across, chunks=overlap_chunks)
    return AllToAll(mesh.expert_parallel.get_group(), chunks=overlap_chunks)


def router_weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that every rank holds whole; their gradients are for the engine to sum."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    return [weight for router in routers for weight in router.parameters()]


def _shard_experts(model: Transformer, mesh: Mesh) -> None:
    for module in model.modules():
        if isinstance(module, MoE):
            for name, weight in list(module.experts.named_parameters()):
                sharded = distribute_tensor(
                    weight, mesh.expert_parallel, [Shard(0)], src_data_rank=None
                )
                mine = nn.Parameter(sharded, weight.requires_grad)
                module.experts.register_parameter(name, mine)


# ---------------------------------------------------------------- compilation


def compile_regions(model: Transformer, recompute: Recompute) -> None:
    """Compile what lies between two gathers, each region as one graph.

    FSDP2's hooks cannot be traced, so they stay outside. Without a capacity, rows differ from call
    to call and their numbers are read on the host: such passes run as they are.
    """
    shapes = [len(module.watched_factors) for module in model.modules() if isinstance(module, MoE)]
    allow_graphs(len(model.blocks), max([1, *shapes]))
    for block in model.blocks:
        assert isinstance(block, Block)
        replace_method(block, "attend", _one_graph(block.attend))
        if block.moe is not None:
            forward = _where_static(block.moe, decides_first=recompute == "full")
            replace_method(block.moe, "forward", forward)
        elif block.feed_forward is not None:
            replace_method(block.feed_forward, "forward", _one_graph(block.feed_forward.forward))


def allow_graphs(num_layers: int, num_shapes: int = 1) -> None:
    """Let every layer have graphs of its own, since its draws are keyed by its number: of training,
    evaluation, recomputation, and all that for each of the capacity factors that it may have. torch
    counts them together, as graphs of one function."""
    dynamo = torch._dynamo.config
    most = 8 * num_layers * num_shapes
    dynamo.recompile_limit = max(most, dynamo.recompile_limit)
    dynamo.accumulated_recompile_limit = max(most, dynamo.accumulated_recompile_limit)


def _one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def replace_method(module: nn.Module, method: str, function: Callable[..., Any]) -> None:
    """Give one module another method; hooks that are registered later surround it."""
    object.__setattr__(module, method, function)


def _where_static(moe: MoE, decides_first: bool) -> Callable[..., LayerOutput]:
    """The compiled forward pass for modes with a capacity, the plain one for the others.

    A pass that decides and one that repeats are two graphs, which save different tensors. So a pass
    that will be recomputed `decides_first`, and is then run by the graph that recomputes it.
    """
    plain, compiled = moe.forward, _one_graph(moe.forward)
    decide = _one_graph(lambda *arguments: moe.route(*arguments).decisions)

    def forward(
        x_BLD: Tensor,
        valid_BL: Tensor,
        mode: Mode,
        *others: Any,
        decided: Decisions | None = None,
        **named: Any,
    ) -> LayerOutput:
        arguments = x_BLD, valid_BL, mode, *others
        if moe.factors[mode] is None:
            return plain(*arguments, decided=decided, **named)
        if decides_first and decided is None and torch.is_grad_enabled():
            with torch.no_grad():
                decided = decide(*arguments)
        return compiled(*arguments, decided=decided, **named)

    return forward


# ---------------------------------------------------------------- recomputation


_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
COSTLY = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _c10d.all_to_all_single.default,
    _c10d.all_gather_into_tensor.default,
]
"""What selective recomputation keeps: matrix products, attention, what was communicated."""


def apply_recompute(model: Transformer, recompute: Recompute) -> None:
    """Let the forward pass forget what it computed, for the backward pass to compute it again.

    full: everything but a block's input and what its router decided. selective: norms, activations
    and permutations, but nothing that took a matrix product or a collective; in regions between
    FSDP2's hooks, of which the bookkeeping of saved operations must not see anything.
    """
    if recompute == "none":
        return
    for block in model.blocks:
        assert isinstance(block, Block)
        if recompute == "full":
            replace_method(block, "forward", _recomputed(block.forward, with_memory=True))
            continue
        selective = partial(create_selective_checkpoint_contexts, COSTLY)
        replace_method(block, "attend", _recomputed(block.attend, context_fn=selective))
        if block.moe is not None:  # shared experts are computed inside it
            forward = _remembering(block.moe.forward)
            run = _recomputed(forward, with_memory=True, context_fn=selective)
            replace_method(block.moe, "forward", run)
        elif block.feed_forward is not None:
            run = _recomputed(block.feed_forward.forward, context_fn=selective)
            replace_method(block.feed_forward, "forward", run)


def _remembering(forward: Callable[..., LayerOutput]) -> Callable[..., LayerOutput]:
    """An MoE layer's forward pass that notes what it decided, or repeats it."""

    def run(*arguments: Any, memory: Memory, **named: Any) -> LayerOutput:
        output = forward(*arguments, decided=memory.decisions, **named)
        memory.decisions = output.decisions
        return output

    return run


def _recomputed(
    forward: Callable[..., Any], with_memory: bool = False, **options: Any
) -> Callable[..., Any]:
    """A function that keeps its arguments alone; each of its calls has a memory of its own."""
    # No generator state: all draws are keyed.
    keep = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, **options)

    def run(*arguments: Any, **named: Any) -> Any:
        if with_memory:
            named["memory"] = Memory()
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return keep(forward, *arguments, **named)

    return run


# ---------------------------------------------------------------- FSDP2


def _apply_fsdp(model: Transformer, mesh: Mesh, precision: Precision) -> None:
    # The reduction stays in the master precision; activations are cast nowhere on the way.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32 if precision == "bf16" else None,
        cast_forward_inputs=False,
    )
    shard = partial(fully_shard, mp_policy=policy, ignored_params=set(router_weights(model)))
    for block in model.blocks:
        layer = _moe_of(block)
        if layer is not None:
            # The whole layer rather than its experts, which it may call several times.
            shard(layer, mesh=mesh.same_experts, shard_placement_fn=lambda weight: Shard(1))
        shard(block, mesh=mesh.dense)
    shard(model, mesh=mesh.dense)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_force_sum_reduction_for_comms(True)
            ranks = mesh.same_experts if isinstance(unit, MoE) else mesh.dense
            if ranks.size() > 1:  # on one, dividing by 1 would take a pass over all gradients
                unit.set_gradient_divide_factor(1.0)
    _prefetch(model)


def _prefetch(model: Transformer) -> None:
    """Gather the weights of a block's experts and of the next block while one computes.

    It is the block that asks for both: experts run again where they are recomputed, when the next
    block is done with. In the backward pass FSDP2 itself gathers one unit ahead.
    """
    blocks: Any = list(model.blocks)
    for block, following in zip_longest(blocks, blocks[1:]):
        ahead = [unit for unit in (_moe_of(block), following) if unit is not None]
        block.set_modules_to_forward_prefetch(ahead)


def _moe_of(block: nn.Module) -> MoE | None:
    """The MoE layer in a block of any make."""
    return next((module for module in block.modules() if isinstance(module, MoE)), None)


# ---------------------------------------------------------------- initial values


@torch.no_grad()
def _initialise(model: Transformer, mesh: Mesh, seed: int) -> None:
    for buffer in model.buffers():
        buffer.zero_()
    for module, parameter, value in initial_values(model, mesh, seed):
        _fill(parameter, value, mesh.same_experts if isinstance(module, Experts) else mesh.dense)


def initial_values(
    model: Transformer, mesh: Mesh, seed: int
) -> Iterator[tuple[nn.Module, nn.Parameter, Tensor]]:
    """Every parameter with its module and the value it starts from: of experts, this rank's."""
    ep_rank = mesh.expert_parallel.get_local_rank()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            experts = range(0)
            if isinstance(module, Experts):
                # A DTensor has the shape of the experts of all ranks, a plain one of its own.
                held = len(parameter) // (mesh.ep if isinstance(parameter.data, DTensor) else 1)
                experts = range(ep_rank * held, (ep_rank + 1) * held)
            shape, num_layers = parameter.shape, len(model.blocks)
            yield module, parameter, initial_value(module, name, shape, seed, num_layers, experts)


def _fill(parameter: nn.Parameter, value: Tensor, fsdp_mesh: Any) -> None:
    """Set this rank's part of a parameter; `value` is what the ranks of `fsdp_mesh` share."""
    value = value.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        parameter.copy_(value)
        return
    placements = parameter.placements[: fsdp_mesh.ndim]
    local = distribute_tensor(value, fsdp_mesh, placements, src_data_rank=None)
    parameter.to_local().copy_(local.to_local())
