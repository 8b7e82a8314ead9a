"""The DeepSpeed engine: ZeRO stages 0, 1 and 2 around AdamW, over our own expert layers.

DeepSpeed reduces gradients, shares the optimizer's state over the ranks (1: moments and master
weights, 2: gradients too) and gathers the weights. It is told of experts what its own expert layers
would tell it; none of that leaves this module. What it gets wrong, or otherwise than the torch
engine, is made right here:

- It averages gradients over ranks and micro-batches; ours are sums. The loss is multiplied by the
  number of ranks, experts' gradients are divided by the same number as dense ones (where #5618 and
  #6545 divided by the ranks that hold the expert, and made them too large), and micro-batches are
  not divided.
- Its global norm averages the squares of the experts' norms over the wrong ranks (#8475), leaves
  the last digits to fp32, and adds 1e-6 before it clips. Norm and clipping are done here, on the
  reduced gradients, every element counted once.
- It would update with a NaN in fp32. Here all ranks agree on norm and loss first, and a step that
  is to be skipped goes the way of its fp16 overflows: gradients dropped.
- In bf16 it would cast the whole module, routers too, and reduce in bf16 at some stages. Here it
  sees fp32 weights alone, and modules round theirs while they run (`moetrain.engines.cast`).
- Its checkpoints know one layout, and a moment loaded into them may be a stale copy (#8147). Here
  `state` names the live memory of every element, and master weights are taken from the model's
  before each update.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.checkpoint import Fragment
from moetrain.config import EngineConfig, TrainConfig
from moetrain.engines.cast import compute_in
from moetrain.engines.deepspeed_config import BUCKET
from moetrain.errors import UserError
from moetrain.mesh import Mesh
from moetrain.model import Transformer
from moetrain.moe import Experts, MoE
from moetrain.optim import StepOutcome, decays, sum_totals
from moetrain.parallel import apply_recompute, compile_regions, initial_values
from moetrain.precision import computes_in
from moetrain.spikes import Limits

EXPERT_GROUP = "moetrain"
"""DeepSpeed's name for the ranks that share a set of experts."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Held(NamedTuple):
    """Where this rank keeps the optimizer's state of a weight."""

    key: nn.Parameter
    """What the optimizer knows it by: the weight itself, or a share of a flat group of weights."""
    start: int
    """First element of the weight that is kept here ..."""
    place: slice
    """... and where in the flat `key` it and those after it are; empty where none is."""


class DeepSpeedEngine:
    """A model whose experts are spread over ranks, under DeepSpeed's engine."""

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        seed: int,
        engine: EngineConfig,
        train: TrainConfig,
        settings: dict[str, Any],
    ):
        """Takes a model on the meta device, and what `deepspeed_config.settings` made of the
        configuration. Collective over the mesh."""
        place(model, mesh, seed)
        if engine.compile:
            compile_regions(model, engine.activation_checkpointing)
        if computes_in(engine) == "bf16":
            compute_in(model, torch.bfloat16)
        apply_recompute(model, engine.activation_checkpointing)
        self.mesh, self.clip_norm = mesh, train.clip_norm
        self.weights = dict(model.named_parameters())
        self._trained = {name: w for name, w in self.weights.items() if w.requires_grad}
        self.buffers = dict(model.named_buffers())
        self.optimizer = torch.optim.AdamW(
            _groups(self._trained, train.weight_decay),
            lr=0.0,
            betas=(train.beta1, train.beta2),
            eps=train.adam_eps,
            fused=True,
        )
        with _refusals() if engine.deepspeed_config else nullcontext():
            self.deepspeed = _start(model, self.optimizer, mesh, settings)
        self.zero = self.deepspeed.optimizer if self.deepspeed.zero_optimization() else None
        self.model = cast(Transformer, self.deepspeed)
        self._loss = torch.zeros((), device=mesh.device, dtype=torch.float64)
        self._norm, self._is_taken = 0.0, True
        if self.zero is not None:
            # What it would find out by itself, and the way to a skipped step.
            self.zero.check_grad_overflow = True
            self.zero.has_overflow = lambda *_, **__: not self._is_taken
            self.zero.scaled_global_norm = lambda *_, **__: torch.tensor(self._norm)
        self._held = self._where_state_is()
        for key in {id(held.key): held.key for held in self._held.values()}.values():
            # From the start rather than from the first step, so that a checkpoint can be loaded.
            self.optimizer.state[key] = {
                "step": torch.zeros((), device=key.device),
                **{moment: torch.zeros_like(key) for moment in MOMENTS},
            }

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`. Up to stage 1, gradients are reduced once, at the last micro-batch."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        # Its reduction is a mean over the ranks.
        self.deepspeed.backward(loss * self.mesh.world, scale_wrt_gas=False)
        self._loss += loss.detach()

    def step(self, lr: float, limits: Limits) -> StepOutcome:
        """See `Engine`."""
        grads = self._grads()
        self._norm, loss = global_norm(grads, self._loss)
        self._loss = torch.zeros_like(self._loss)
        self._is_taken = limits.admit(loss, self._norm)
        if self.clip_norm and self._norm > self.clip_norm:
            for tensors, _ in grads:
                torch._foreach_mul_(tensors, self.clip_norm / self._norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.zero is not None:
            self.zero.refresh_fp32_params()
        if self.zero is not None or self._is_taken:
            self.deepspeed.step()
        else:
            self.deepspeed.zero_grad()
        return StepOutcome(loss, self._norm, not self._is_taken)

    def state(self) -> dict[str, Tensor]:
        """See `Engine`. Weights of experts and all moments are `Fragment`s."""
        tensors: dict[str, Tensor] = {f"model.{name}": t for name, t in self.buffers.items()}
        for name, weight in self.weights.items():
            shape, first = self._logical(weight)
            whole = weight.detach()
            spread = weight.shape != shape
            tensors[f"model.{name}"] = (
                Fragment.of_flat(shape, first, whole.view(-1)) if spread else whole
            )
            if (held := self._held.get(name)) is None:  # frozen
                continue
            for moment in MOMENTS:
                flat = self.optimizer.state[held.key][moment].view(-1)[held.place]
                tensors[f"optimizer.{name}.{moment}"] = Fragment.of_flat(
                    shape, first + held.start, flat
                )
            tensors[f"optimizer.{name}.step"] = self.optimizer.state[held.key]["step"]
        return tensors

    def _grads(self) -> list[tuple[list[Tensor], int]]:
        """Reduced gradients on this rank, and on how many ranks each of them is."""
        if self.zero is None:
            shared = [(self.mesh.world, False), (self.mesh.edp, True)]
            grads = {
                kind: [w.grad for w in self._trained.values() if _is_expert(w) == kind]
                for _, kind in shared
            }
            return [(grads[kind], ranks) for ranks, kind in shared if grads[kind]]  # type: ignore[misc]
        if self.zero.cpu_offload:
            if self.mesh.device.type == "cuda":
                # They may still be on their way to pinned memory; ZeRO waits for them in its step.
                torch.cuda.synchronize(self.mesh.device)
            return [([part.grad for part in self.zero.single_partition_of_fp32_groups], 1)]
        return [(list(grads), 1) for grads in self.zero.averaged_gradients.values()]

    def _where_state_is(self) -> dict[str, Held]:
        """By name of weight. ZeRO cuts the flat buffer of a group into equal shares."""
        if self.zero is None:
            return {name: Held(w, 0, slice(w.numel())) for name, w in self._trained.items()}
        held, names = {}, {id(weight): name for name, weight in self._trained.items()}
        for number, share in enumerate(self.zero.single_partition_of_fp32_groups):
            flat, size = self.zero.bit16_groups_flat[number], share.numel()
            begin = dist.get_rank(self.zero.real_dp_process_group[number]) * size
            for weight in self.zero.bit16_groups[number]:
                offset = (weight.data_ptr() - flat.data_ptr()) // flat.element_size()
                first, end = max(offset, begin), min(offset + weight.numel(), begin + size)
                mine = slice(first - begin, end - begin) if first < end else slice(0)
                held[names[id(weight)]] = Held(share, max(first - offset, 0), mine)
        return held

    def _logical(self, weight: nn.Parameter) -> tuple[torch.Size, int]:
        """Full shape of a weight, and which of its elements is the first one here."""
        if not _is_expert(weight):
            return weight.shape, 0
        ep_rank = self.mesh.expert_parallel.get_local_rank()
        shape = torch.Size([weight.shape[0] * self.mesh.ep, *weight.shape[1:]])
        return shape, ep_rank * weight.numel()


def global_norm(grads: list[tuple[list[Tensor], int]], loss: Tensor) -> tuple[float, float]:
    """The 2-norm of the whole model's gradient, every element counted once, and the global loss.

    `grads` are tensors, each with the number of ranks that have it; none twice on one rank. `loss`
    (fp64, 0-d) is this rank's share. The norm is not a finite number on any rank if a share is not.
    Collective over the default group.
    """
    squares = torch.zeros_like(loss)
    for tensors, ranks in grads:
        norms = torch.stack(torch._foreach_norm(tensors)).to(loss.device)
        squares += norms.double().square().sum() / ranks
    return sum_totals(squares, loss)


@torch.no_grad()
def place(model: Transformer, mesh: Mesh, seed: int) -> None:
    """Keep this rank's experts alone, and give a model on the meta device its initial values.

    The way to the other experts is `moetrain.parallel.connect_experts`.
    """
    if mesh.ep > 1:
        for module in model.modules():
            if isinstance(module, MoE):
                for name, weight in list(module.experts.named_parameters()):
                    mine = weight[: len(weight) // mesh.ep].detach().clone()
                    mine = nn.Parameter(mine, weight.requires_grad)
                    module.experts.register_parameter(name, mine)
    model.to_empty(device=mesh.device)
    for buffer in model.buffers():
        buffer.zero_()
    for module, weight, value in initial_values(model, mesh, seed):
        if isinstance(module, Experts) and mesh.ep > 1:
            # reduced over the ranks that hold the same ones alone
            weight.allreduce, weight.group_name = False, EXPERT_GROUP  # type: ignore[attr-defined]
        weight.copy_(value)


def _is_expert(weight: Tensor) -> bool:
    """Whether other ranks hold other experts in its place."""
    return not getattr(weight, "allreduce", True)


def _groups(weights: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: by decay, and experts in groups that DeepSpeed knows by their mark."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for weight in weights.values():
        groups.setdefault((decays(weight), _is_expert(weight)), []).append(weight)
    mark = {"moe": True, "name": EXPERT_GROUP}
    return [
        {
            "params": members,
            "weight_decay": weight_decay if decay else 0.0,
            **(mark if is_expert else {}),
        }
        for (decay, is_expert), members in groups.items()
    ]


# ---- starting it ---------------------------------------------------------------------------------


def _start(
    model: Transformer, optimizer: torch.optim.AdamW, mesh: Mesh, settings: dict[str, Any]
) -> Any:
    """DeepSpeed's engine over the process group that is there."""
    with _environment(mesh):
        deepspeed = _import()
        # It would compile a shared-memory all-reduce for inference, for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        _use_groups(mesh)
        zero = settings["zero_optimization"]
        # Its default is 2 GB, whatever the size of the model.
        numel = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        zero.setdefault("reduce_bucket_size", min(numel, BUCKET))
        with _expert_layer(model, mesh):
            return deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )[0]


@contextmanager
def _refusals() -> Iterator[None]:
    """What DeepSpeed itself finds wrong with a user's settings, as an error of the user's."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        raise UserError(f"engine.deepspeed_config: DeepSpeed refuses: {error}") from error


@contextmanager
def _environment(mesh: Mesh) -> Iterator[None]:
    """What DeepSpeed looks up, where no launcher has set it."""
    wanted = {
        "RANK": mesh.rank,
        "LOCAL_RANK": mesh.device.index or 0,
        "WORLD_SIZE": mesh.world,
        "DS_ACCELERATOR": mesh.device.type,
    }
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: str(wanted[name]) for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _import() -> Any:
    """DeepSpeed, without what it says when it is imported."""
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        deepspeed = importlib.import_module("deepspeed")
        importlib.import_module("deepspeed.ops")
    finally:
        logging.disable(quiet)
    # Of the newest torch, about a call of DeepSpeed's.
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor.* is deprecated", FutureWarning)
    return deepspeed


def _use_groups(mesh: Mesh) -> None:
    """Let it reduce over the mesh's groups, instead of making the same ones again."""
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    groups._WORLD_GROUP = mesh.dense.get_group()
    for kind, axis in (("PARALLEL", mesh.expert_parallel), ("DATA_PARALLEL", mesh.same_experts)):
        group = axis.get_group()
        getattr(groups, f"_EXPERT_{kind}_GROUP").update({EXPERT_GROUP: group})
        ranks = dist.get_process_group_ranks(group)
        getattr(groups, f"_EXPERT_{kind}_GROUP_RANKS").update({EXPERT_GROUP: ranks})


@contextmanager
def _expert_layer(model: nn.Module, mesh: Mesh) -> Iterator[None]:
    """What it takes for a layer of its own, while it looks whether the model has any: where it is
    to reduce gradients of experts apart from others."""
    if not any(_is_expert(weight) and weight.requires_grad for weight in model.parameters()):
        yield
        return
    layers: Any = importlib.import_module("deepspeed.moe.layer")

    class Mark(layers.MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = mesh.ep

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            """The groups are there."""

    model.add_module("mark", Mark())
    try:
        yield
    finally:
        del model._modules["mark"]
