"""The torch engine: FSDP2 and fused AdamW."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.config import EngineConfig, TrainConfig
from moetrain.mesh import Mesh
from moetrain.model import Transformer
from moetrain.optim import StepOutcome, adamw, global_grad_norm, scale_grads
from moetrain.parallel import parallelize, router_weights
from moetrain.precision import computes_in
from moetrain.spikes import Limits


class TorchEngine:
    """A model spread by `parallelize`, and AdamW over its shards."""

    def __init__(
        self, model: Transformer, mesh: Mesh, seed: int, engine: EngineConfig, train: TrainConfig
    ):
        """Takes a model on the meta device. Collective over the mesh."""
        recompute, compiled = engine.activation_checkpointing, engine.compile
        self.model = parallelize(model, mesh, computes_in(engine), seed, recompute, compiled)
        self._routers = [weight for weight in router_weights(model) if weight.requires_grad]
        # Kept here: between a forward and a backward pass, FSDP2 puts gathered copies in the model.
        self.weights = dict(self.model.named_parameters())
        self.mesh = mesh
        self.buffers = dict(self.model.named_buffers())
        self.clip_norm = train.clip_norm
        self._loss = torch.zeros((), device=mesh.device, dtype=torch.float64)
        self.optimizer = adamw(
            [weight for weight in self.weights.values() if weight.requires_grad],
            betas=(train.beta1, train.beta2),
            eps=train.adam_eps,
            weight_decay=train.weight_decay,
        )

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`. Gradients are reduced over the ranks once, at the last micro-batch."""
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        loss.backward()
        if last:
            self.mesh.sum_in_place([weight.grad for weight in self._routers])  # type: ignore[misc]
        self._loss += loss.detach()

    def step(self, lr: float, limits: Limits) -> StepOutcome:
        """See `Engine`."""
        weights = self.weights.values()
        norm, loss = global_grad_norm(weights, self.mesh.dp_replicate, self._loss)
        self._loss = torch.zeros_like(self._loss)
        is_taken = limits.admit(loss, norm)
        if is_taken:
            if self.clip_norm and norm > self.clip_norm:
                scale_grads(weights, self.clip_norm / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return StepOutcome(loss, norm, not is_taken)

    def state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        tensors = {f"model.{name}": buffer for name, buffer in self.buffers.items()}
        for name, weight in self.weights.items():
            tensors[f"model.{name}"] = weight.detach()
            for key, value in self.optimizer.state.get(weight, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors
