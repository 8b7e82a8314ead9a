"""Short trainings from one shared start, all variants in turn.

Variants of one shape share a model. It is trained for a while; from there each variant goes on with
its own weights and moments, which wait in host memory while others have their turn. A turn is a few
optimizer steps and an evaluation. Whose turn it is changes from round to round, so that whatever
disturbs the machine disturbs all, and speeds are compared within a round. A repeat goes on from the
same start with the text that follows.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from harness import CLEAR_PEAK, Device, peak_bytes, synchronize, turns
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moetrain.build import build_model
from moetrain.config import Config
from moetrain.errors import UserError
from moetrain.evaluate import evaluate
from moetrain.mesh import Mesh, gather
from moetrain.metrics import LayerLine, drop_rate, layer_line
from moetrain.moe import MoE
from moetrain.moe.packed import cut
from moetrain.objective import Means, reduce
from moetrain.parallel import allow_graphs
from moetrain.precision import compute_dtype
from moetrain.step import Position, Run, StepResult, sample_indices, train_step
from moetrain.trace import TraceLog, num_ranked
from moetrain.train import advance, set_up
from sweeping.plan import Length, Variant, with_moe
from sweeping.rates import all_to_all_bytes

TURN = 10
"""Optimizer steps of a turn."""
MEMORY_STEPS = 3
"""Whose median peak counts: on a CPU that varies with where the allocator finds room."""

State = dict[str, Tensor]
"""Weights, buffers and moments of this rank, in host memory."""
Say = Callable[[str], None]


class Step(NamedTuple):
    """One optimizer step of a variant."""

    step: int
    loss: float
    """Training loss, without auxiliary losses."""
    seconds: float
    """Of the slowest rank."""
    layers: list[LayerLine]
    executed_rows: int
    """That the experts of all layers and ranks multiplied, empty ones too."""


class HeldOut(NamedTuple):
    """One evaluation on held-out text."""

    step: int
    loss: float
    drop_rate: float


@dataclass
class Trail:
    """What a variant did in one repeat."""

    steps: list[Step] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    """Median seconds of a step, turn by turn."""
    held_out: list[HeldOut] = field(default_factory=list)
    """At the shared evaluation factor: at the start and after every turn."""
    own: HeldOut | None = None
    """The last with the training factor in evaluation, too."""
    bad_steps: int = 0
    """Steps whose loss or gradient was not finite."""


class Facts(NamedTuple):
    """What does not depend on the text."""

    all_to_all_bytes: int
    """That a rank sends in a step."""
    held_bytes: int
    """Weights and moments, on the rank that holds most."""
    step_bytes: int | None
    """The most memory that a step takes beyond what is there before it, on the rank that takes
    most: of the process on a CPU, of torch's allocator on a GPU; None where it cannot be told."""


class Live(NamedTuple):
    """All that was seen of one variant."""

    facts: Facts
    trails: list[Trail]
    """Repeat by repeat."""


def sweep(
    variants: Sequence[Variant],
    own: Variant,
    base: Config,
    length: Length,
    repeats: int,
    mesh: Mesh,
    folder: Path,
    say: Say,
) -> list[Live]:
    """Train all variants, and record the routing of `own` in FOLDER/trace; a collective."""
    models = {}
    for variant in variants:
        if variant.shape not in models:
            router, top_k, experts = variant.shape
            say(f"{length.warm_start} steps as a start: {router}, K {top_k}, E {experts}")
            home, alike = _at_home(variant.config, base), [v.shape for v in variants]
            if home.engine.compile:
                allow_graphs(home.model.layers, 1 + alike.count(variant.shape))
            models[variant.shape] = Model(home, length, mesh, folder)
    facts = [models[variant.shape].facts(variant.config) for variant in variants]
    trails = [[Trail() for _ in range(repeats)] for _ in variants]
    for repeat in range(repeats):
        contenders = [
            _Contender(models[variant.shape], variant.config, trail[repeat], repeat * length.steps)
            for variant, trail in zip(variants, trails, strict=True)
        ]
        for number in range(math.ceil(length.steps / TURN)):
            for contender in turns(contenders, number):
                contender.turn(min(TURN, length.steps - number * TURN))
            done = min(length.steps, (number + 1) * TURN)
            say(f"repeat {repeat + 1} of {repeats}: {done} of {length.steps} steps of each variant")
        for contender in contenders:
            contender.finish()
    say(f"{length.steps} steps of {own.label} once more, to record its routing")
    record(models[own.shape], own.config, length.steps, folder)
    return [Live(*pair) for pair in zip(facts, trails, strict=True)]


def _at_home(config: Config, base: Config) -> Config:
    """The setting of the warm start: of the layers' shape alone another one than the config's."""
    moe = base.moe
    return with_moe(
        config, capacity_factor=moe.capacity_factor, drop_policy=moe.drop_policy, group=moe.group
    )


class Model:
    """A model that stands for one variant after the other."""

    def __init__(self, config: Config, length: Length, mesh: Mesh, folder: Path):
        """Trains the start that its variants share. Collective."""
        self.run, self.position = set_up(config, folder, mesh), Position()
        for _ in range(length.warm_start):
            self.position, _ = step(self.run, self.position)
            if self.position.bad_in_a_row >= config.train.max_bad_steps:
                raise UserError(
                    f"{length.warm_start} steps as a start ({config.moe.router}, K "
                    f"{config.moe.top_k}, E {config.moe.experts}): loss or gradient was not finite "
                    f"up to step {self.position.step}; try a train.lr below {config.train.lr:g}"
                )
        self.start = hold(self.run)

    def facts(self, config: Config) -> Facts:
        """Look at a setting, and try a step for the memory it takes; a collective."""
        run, mesh = self.wear(config, self.start), self.run.mesh
        device: Device = "cuda" if mesh.device.type == "cuda" else "cpu"
        train_step(run, self.position)  # what is made once is there already
        taken = None
        if device == "cuda" or CLEAR_PEAK.exists():
            peaks = [
                peak_bytes(lambda: train_step(run, self.position), device)
                for _ in range(MEMORY_STEPS)
            ]
            taken = max(gather(round(statistics.median(peaks))))
        held = max(gather(sum(tensor.nbytes for tensor in self.start.values())))
        vocab = run.prepared.manifest.vocab_size
        sent = all_to_all_bytes(config, build_model(config, vocab), mesh.world)
        return Facts(sent, held, taken)

    def wear(self, config: Config, state: State) -> Run:
        """The run of another setting, with these weights and moments."""
        self.run = with_setting(self.run, config)
        put_back(self.run, state)
        return self.run


class _Contender:
    """One variant in one repeat."""

    def __init__(self, model: Model, config: Config, trail: Trail, skipped_steps: int):
        """`skipped_steps`: whose text earlier repeats have read."""
        self.model, self.config, self.trail = model, config, trail
        skipped = skipped_steps * config.train.global_batch
        position = model.position
        self.position = replace(position, samples=position.samples + skipped)
        self.state = model.start

    def turn(self, num_steps: int) -> None:
        """So many steps, and an evaluation; a collective."""
        if self._has_diverged():
            return
        run = self.model.wear(self.config, self.state)
        if not self.trail.held_out:
            self.trail.held_out.append(self._evaluation(run))
        seconds = []
        for _ in range(num_steps):
            self.position, seen = step(run, self.position)
            self.trail.steps.append(seen)
            seconds.append(seen.seconds)
        self.trail.turns.append(statistics.median(seconds))
        self.trail.bad_steps = self.position.bad_steps - self.model.position.bad_steps
        self.trail.held_out.append(self._evaluation(run))
        self.state = hold(run)

    def finish(self) -> None:
        """Evaluate with the training factor; a collective."""
        factor = self.config.moe.capacity_factor
        own = with_moe(self.config, eval_capacity_factor=factor)
        self.trail.own = self._evaluation(self.model.wear(own, self.state))
        self.state = {}  # makes room

    def _has_diverged(self) -> bool:
        return self.position.bad_in_a_row >= self.config.train.max_bad_steps

    def _evaluation(self, run: Run) -> HeldOut:
        sequences = run.config.eval.sequences
        means = evaluate(run.engine.model, run.held_out, sequences, run.config, run.mesh)
        assert means is not None, "nothing interrupts it"
        loss = math.nan if self._has_diverged() else means.loss
        return HeldOut(self.position.step, loss, drop_rate(means.ledgers))


def record(model: Model, config: Config, steps: int, folder: Path) -> None:
    """Train a variant once more and record the second half, in FOLDER/trace; a collective.

    It does again what it did in the first repeat, bit by bit, but not while time is taken.
    """
    run, position = model.wear(config, model.start), model.position
    mesh = run.mesh
    log = TraceLog(folder, config, mesh.rank, mesh.world)
    factors = [layer.factors["train"] for layer in layers_of(run.engine.model)]
    for number in range(steps):
        batches = sample_indices(config, mesh.rank, mesh.world, position.samples)
        ranked = num_ranked(config.moe) if number >= steps // 2 else 0
        result = train_step(run, position, ranked)
        position = advance(position, config, result)
        if ranked:
            samples = [index for batch in batches for index in batch]
            log.write(position.step, samples, [part.preferences for part in result.parts], factors)


def step(run: Run, position: Position) -> tuple[Position, Step]:
    """One optimizer step, timed without what is only told; a collective."""
    synchronize(run.mesh.device.type)
    started = time.perf_counter()
    result = train_step(run, position)
    synchronize(run.mesh.device.type)
    seconds = max(gather(time.perf_counter() - started))
    position = advance(position, run.config, result)
    means: Means = reduce(result.parts, result.counts, run.mesh, result.batch_balance)
    factors = zip(means.layers, result.capacity_factors, strict=True)
    layers = [layer_line(layer, factor) for layer, factor in factors]
    return position, Step(position.step, means.loss, seconds, layers, executed_rows(run, result))


def executed_rows(run: Run, result: StepResult) -> int:
    """Rows that the experts of all layers and ranks multiplied in a step, empty ones too; a
    collective."""
    config, mesh = run.config, run.mesh
    ledgers = [ledger for part in result.parts for ledger in part.ledgers]
    is_compiled = config.engine.compile and config.moe.capacity_factor is not None
    if mesh.device.type == "cuda" or is_compiled or config.moe.expert_dropout:  # all slots
        return sum(gather(sum(int(ledger.slots) for ledger in ledgers)))
    row_NE = torch.stack([ledger.row_E for ledger in ledgers])
    dist.all_reduce(row_NE, group=mesh.expert_parallel.get_group())
    mine_Ne = row_NE.chunk(mesh.ep, dim=1)[mesh.expert_parallel.get_local_rank()]
    dim, hidden_dim, dtype = config.model.dim, config.expert_ffn_dim, compute_dtype(config.engine)
    groups = [
        group
        for part_Nn in mine_Ne.chunk(config.parallel.overlap_chunks, dim=1)
        for counts in part_Nn.tolist()
        for group in cut(counts, dim, hidden_dim, dtype)
    ]
    return sum(gather(sum(len(group.counts) * group.room for group in groups)))


def with_setting(run: Run, config: Config) -> Run:
    """The same model under what a config says of capacity; its shape must be the same."""
    wanted = build_model(config, run.prepared.manifest.vocab_size)
    for layer, other in zip(layers_of(run.engine.model), layers_of(wanted), strict=True):
        layer.factors, layer.min_capacity = other.factors, other.min_capacity
        layer.group, layer.drop_policy = other.group, other.drop_policy
        layer.spill_depth = other.spill_depth
    return replace(run, config=config)


def hold(run: Run) -> State:
    """A copy of this rank's weights, buffers and moments in host memory."""
    copies = {}
    for name, tensor in run.engine.state().items():
        copies[name] = torch.empty_like(_local(tensor), device="cpu").copy_(_local(tensor))
    return copies


def put_back(run: Run, state: State) -> None:
    """Give the model the weights, buffers and moments that were held."""
    for module in run.engine.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what an evaluation has gathered is of the weights before
    for name, tensor in run.engine.state().items():
        _local(tensor).copy_(state[name])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def layers_of(model: torch.nn.Module) -> list[MoE]:
    """The layers of experts, first to last."""
    return [module for module in model.modules() if isinstance(module, MoE)]
