"""The least that training MoE layers on several ranks takes: what a library's user would write.

Weights are whole but for the experts, of which every rank holds its own; gradients are summed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.mesh import Mesh
from moetrain.model import initial_value
from moetrain.moe import AllToAll, Experts, MoE


class PlainEngine:
    """Stands where `moetrain.engines.torch.TorchEngine` does: the same calls, no sharding, no
    optimizer."""

    def __init__(self, model: nn.Module, mesh: Mesh, dtype: torch.dtype, num_layers: int):
        """Takes a model on the meta device, of which nothing but its experts is spread."""
        self.model, self.mesh = model, mesh
        self.ep_rank = mesh.expert_parallel.get_local_rank()
        for module in model.modules():
            if isinstance(module, MoE) and mesh.ep > 1:
                module.dispatcher = AllToAll(mesh.expert_parallel.get_group())
        self._initialise(dtype, num_layers)
        self.weights = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers())

    def _initialise(self, dtype: torch.dtype, num_layers: int) -> None:
        # bf16 is for experts; a router stays in fp32
        wide = torch.promote_types(dtype, torch.float32)
        for prefix, module in list(self.model.named_modules()):
            for name, weight in list(module.named_parameters(prefix, recurse=False)):
                is_expert = isinstance(module, Experts)
                experts = self._mine(len(weight)) if is_expert else range(0)
                value = initial_value(module, name, weight.shape, 0, num_layers, experts)
                value = value.to(dtype if is_expert else wide)
                module.register_parameter(name.rpartition(".")[2], nn.Parameter(value))
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, torch.zeros(buffer.shape, dtype=wide))

    def _mine(self, num_experts: int) -> range:
        size = num_experts // self.mesh.ep
        return range(self.ep_rank * size, (self.ep_rank + 1) * size)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A weight, or its gradient, with all experts."""
        if not _is_expert(name) or self.mesh.ep == 1:
            return tensor.detach().clone()
        whole = tensor.new_zeros(self.mesh.ep * len(tensor), *tensor.shape[1:])
        mine = self._mine(len(whole))
        whole[mine.start : mine.stop] = tensor.detach()
        dist.all_reduce(whole, group=self.mesh.expert_parallel.get_group())
        return whole

    @torch.no_grad()
    def set(self, name: str, tensor: Tensor, value: Tensor) -> None:
        """Give a weight the rank's share of a whole value."""
        mine = self._mine(len(value)) if _is_expert(name) else range(len(value))
        tensor.copy_(value[mine.start : mine.stop])

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add up gradients; at the last call over the ranks too."""
        loss.backward()
        if last:
            for name, weight in self.weights.items():
                if weight.grad is not None and not _is_expert(name):
                    dist.all_reduce(weight.grad)
                elif weight.grad is not None and self.mesh.edp > 1:
                    dist.all_reduce(weight.grad, group=self.mesh.same_experts.get_group())

    def step(self, lr: float) -> float:
        """The norm of the whole gradient, which is cleared."""
        squares = torch.zeros(2, dtype=torch.float64)
        for name, weight in self.weights.items():
            if weight.grad is not None:
                squares[int(_is_expert(name))] += weight.grad.double().square().sum()
        dist.all_reduce(squares[1:])
        self.model.zero_grad()
        return (squares[0] + squares[1] / self.mesh.edp).sqrt().item()


def _is_expert(name: str) -> bool:
    return ".experts." in name
