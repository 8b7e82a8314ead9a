"""Parallelism, applied to a single-device model from outside, in this order:

1. expert parallelism: expert weights become DTensors sharded by expert over `ep`, and every MoE
   layer gets the all-to-all dispatcher;
2. FSDP2: routers (in fp32) and dense weights over all data ranks, experts over the ranks that hold
   the same ones;
3. storage: the meta-device model gets memory, and its initial values.

Gradients are summed, not averaged: the loss is already divided by the global number of targets, so
dense and expert weights need no divisor, whatever the number of ranks that hold them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moetrain.mesh import Mesh
from moetrain.model import Transformer, initial_value
from moetrain.moe import AllToAll, Experts, MoE

Precision = Literal["fp32", "bf16", "fp64"]


def parallelize(model: Transformer, mesh: Mesh, precision: Precision, seed: int) -> Transformer:
    """Spread a model built on the meta device over the mesh and initialise it, in place."""
    if precision == "fp64":
        model.double()
    if mesh.ep > 1:
        _apply_expert_parallelism(model, mesh)
    _apply_fsdp(model, mesh, precision)
    model.to_empty(device=mesh.device)
    _initialise(model, mesh, seed)
    return model


def _apply_expert_parallelism(model: Transformer, mesh: Mesh) -> None:
    for module in model.modules():
        if isinstance(module, MoE):
            module.dispatcher = AllToAll(mesh.expert_parallel.get_group())
            for name, weight in list(module.experts.named_parameters()):
                sharded = distribute_tensor(
                    weight, mesh.expert_parallel, [Shard(0)], src_data_rank=None
                )
                module.experts.register_parameter(name, nn.Parameter(sharded))


def _apply_fsdp(model: Transformer, mesh: Mesh, precision: Precision) -> None:
    # The reduction stays in the master precision; activations are cast nowhere on the way.
    compute = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32 if precision == "bf16" else None,
        cast_forward_inputs=False,
    )
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    for module in list(model.modules()):
        if isinstance(module, MoE):
            if any(True for _ in module.router.parameters()):
                fully_shard(module.router, mesh=mesh.dense, mp_policy=exact)
            fully_shard(
                module.experts,
                mesh=mesh.same_experts,
                mp_policy=compute,
                shard_placement_fn=lambda weight: Shard(1),
            )
    for block in model.blocks:
        fully_shard(block, mesh=mesh.dense, mp_policy=compute)
    fully_shard(model, mesh=mesh.dense, mp_policy=compute)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def _initialise(model: Transformer, mesh: Mesh, seed: int) -> None:
    for buffer in model.buffers():
        buffer.zero_()
    ep_rank = mesh.expert_parallel.get_local_rank()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            assert isinstance(parameter, DTensor)
            experts = range(0)
            if isinstance(module, Experts):
                num_local = parameter.shape[0] // mesh.ep
                experts = range(ep_rank * num_local, (ep_rank + 1) * num_local)
            value = initial_value(module, name, parameter.shape, seed, len(model.blocks), experts)
            fsdp_mesh = mesh.same_experts if isinstance(module, Experts) else mesh.dense
            placements = parameter.placements[: fsdp_mesh.ndim]
            local = distribute_tensor(
                value.to(mesh.device, parameter.dtype), fsdp_mesh, placements, src_data_rank=None
            )
            parameter.to_local().copy_(local.to_local())
