"""Engines: what turns a loss into the next weights, sharded over the ranks.

The training loop knows this protocol alone; what an engine needs of parameters stays inside it.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch import __version__ as torch_version

from moetrain.config import Config
from moetrain.engines.deepspeed import DeepSpeedEngine
from moetrain.engines.deepspeed_config import settings
from moetrain.engines.torch import TorchEngine
from moetrain.errors import UserError
from moetrain.mesh import Mesh
from moetrain.model import Transformer
from moetrain.optim import StepOutcome
from moetrain.parallel import connect_experts
from moetrain.spikes import Limits


class Engine(Protocol):
    """A sharded model and its optimizer."""

    model: Transformer

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch; `last` says that a step follows.

        The gradients of all ranks and micro-batches are summed, so `loss` must already be divided
        by the global counts.
        """
        ...

    def step(self, lr: float, limits: Limits) -> StepOutcome:
        """Clip by the global gradient norm, update, clear the gradients.

        Where a loss or a gradient of any rank is not finite, or the global loss or the norm before
        clipping is above its limit, all ranks clear the gradients alone: weights, moments and step
        counts are left as they were.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by logical name and in full logical shape.

        Weights and buffers as `model.NAME`, moments and step counts as `optimizer.NAME.KEY`. The
        tensors are the live ones (DTensors where sharded): loading writes into them.
        """
        ...


def check(config: Config, world_size: int) -> None:
    """Raise UserError where the engine cannot run as configured; needs no process group."""
    engine = config.engine
    # Attention's backward pass then mixes fp64 and fp32.
    if engine.compile and engine.precision == "fp64" and torch_version < "2.13":
        raise UserError(
            f"engine.compile (true) with engine.precision (fp64) needs torch 2.13, which is not "
            f"installed ({torch_version} is); set engine.compile to false, or engine.precision "
            "to fp32"
        )
    if config.engine.kind == "deepspeed":
        settings(config, world_size)


def build(config: Config, model: Transformer, mesh: Mesh) -> Engine:
    """The engine of a configuration, around a model on the meta device. Collective."""
    common = model, mesh, config.seed, config.engine, config.train
    if config.engine.kind == "deepspeed":
        engine = DeepSpeedEngine(*common, settings(config, mesh.world))
    else:
        engine = TorchEngine(*common)
    parallel, compiled = config.parallel, config.engine.compile
    connect_experts(model, mesh, parallel.dispatch, parallel.overlap_chunks, compiled)
    return engine
