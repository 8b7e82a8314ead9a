"""moetrain's training step, as a run takes it: `moetrain.step.train_step` on the torch engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.build import build_model
from moetrain.config import Config
from moetrain.data import Batch, Samples
from moetrain.evaluate import forward, on_device
from moetrain.mesh import Mesh
from moetrain.moe.ledger import DROPPED, Ledger
from moetrain.step import Position, sample_indices, train_step
from moetrain.train import set_up
from stepping.shapes import Cell, config_of


class OwnStep:
    """A run without its files: data, engine, where it stands."""

    def __init__(self, cell: Cell, device: torch.device, capacity_factor: float | None):
        self.config = config_of(cell, capacity_factor)
        self.run = set_up(self.config, Path(), mesh_of(device, cell.ranks))
        self.position = Position()
        self.ledgers: list[Ledger] = []

    def step(self) -> None:
        """One optimizer step on the next batch."""
        result = train_step(self.run, self.position)
        self.ledgers = [ledger for part in result.parts for ledger in part.ledgers]
        self.position = after(self.position, self.config)

    @torch.no_grad()
    def facts(self) -> dict[str, float]:
        """Parameters, the loss of the first sample with the weights as they are: nats per token,
        in fp32, without drops; and this rank's assignments of the last step, if there was one."""
        model = build_model(self.config, self.run.prepared.manifest.vocab_size)
        model.load_state_dict(model_weights(self.run.engine.state()), assign=True)
        batch = first_batch(self.run.samples, self.run.mesh.device)
        loss_sum = forward(model, batch, "eval").loss_sum
        assert loss_sum is not None
        return {
            "parameters": count(model),
            "loss": loss_sum.item() / batch.targets_BL.numel(),
            "assigned": sum(int(one.assigned) for one in self.ledgers),
            "dropped": sum(int(one.outcome_EKO[..., DROPPED].sum()) for one in self.ledgers),
        }


def capacity_step(cell: Cell, device: torch.device) -> OwnStep:
    """Every expert with slots for a quarter more than the mean demand: moetrain's default."""
    return OwnStep(cell, device, capacity_factor=1.25)


def dropless_step(cell: Cell, device: torch.device) -> OwnStep:
    """Every assignment computed, as Mixtral does."""
    return OwnStep(cell, device, capacity_factor=None)


def mesh_of(device: torch.device, ep: int) -> Mesh:
    """The mesh of a run; a process that has no group yet is alone."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    return Mesh(device, ep)


def model_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in an engine's state, whole."""
    return {
        name.removeprefix("model."): tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in state.items()
        if name.startswith("model.")
    }


def after(position: Position, config: Config) -> Position:
    """Where a run stands one step later."""
    samples = position.samples + config.train.global_batch
    return Position(position.step + 1, samples, samples * config.data.seq_len)


def batches(
    config: Config, samples: Samples, position: Position, device: torch.device
) -> Iterator[Batch]:
    """This rank's micro-batches of a step, as `train_step` reads them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for indices in sample_indices(config, rank, world, first=position.samples):
        yield on_device(samples.batch(indices), device)


def first_batch(samples: Samples, device: torch.device) -> Batch:
    """The first sample alone."""
    return on_device(samples.batch([0]), device)


def count(model: nn.Module) -> int:
    """Parameters, a tied one once."""
    return sum(parameter.numel() for parameter in model.parameters())
