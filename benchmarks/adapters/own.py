"""moetrain under its own conformance suite: a stack of its MoE layers on the ranks of a layout.

`Own("layer")` uses the public classes and sums gradients by hand; `Own("engine")` trains the same
stack as a run does, sharded, by moetrain's engine.

Shape suffixes: B sequences, L tokens, T = B·L, D model width, K choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from adapters.plain import PlainEngine
from moetrain import checkpoint as checkpoints
from moetrain.build import gate as build_gate
from moetrain.build import training_factor
from moetrain.config import Config, EngineConfig, TrainConfig
from moetrain.engines.torch import TorchEngine
from moetrain.mesh import Mesh
from moetrain.metrics import layer_line
from moetrain.model import Output
from moetrain.moe import Dispatcher, Draws, Experts, MoE, Plan, Router
from moetrain.moe.keyed import step_key
from moetrain.moe.routing import Routing
from moetrain.objective import Counts, Sums, count_all, loads, objective, reduce, sums
from moetrain.precision import Precision
from moetrain.spikes import FINITE
from moetrain.testing.conformance import Case, Layout, Mode, Pass, Routes, Tensors, Tokens

BALANCE, Z = 0.1, 0.01
PRECISION: dict[torch.dtype, Precision] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
}
Kind = Literal["layer", "engine"]
Chooses = Literal["logits", "groups", "tokens", "all", "fixed"]
GATES: dict[str, tuple[int, Chooses, dict[str, Any]]] = {
    "switch": (1, "logits", {"jitter": 0.1}),
    "gshard": (2, "logits", {}),
    "topk": (2, "logits", {}),
    "noisy_topk": (2, "logits", {}),
    "sigmoid": (2, "logits", {"gate_scale": 2.5}),
    "expert_choice": (2, "tokens", {"allow_noncausal": True}),
    "hash": (2, "fixed", {}),
    "random": (2, "fixed", {}),
    "balanced": (2, "fixed", {}),
    "dense": (8, "all", {}),
    "hierarchical": (2, "groups", {"expert_groups": 2}),
}
"""Choices per token, how they are made, and further settings of every gate."""


def case(gate: str, **changes: Any) -> Case:
    """The case in which a gate is tested, unless it says otherwise."""
    top_k, chooses, _ = GATES[gate]
    experts = changes.get("experts", 8)
    changes.setdefault("top_k", experts if chooses == "all" else top_k)
    return Case(gate, chooses=chooses, draws=True, **changes)


class Stack(nn.Module):
    """MoE layers beside each other: all get the same input, their outputs are added."""

    def __init__(self, layers: list[MoE]):
        super().__init__()
        self.layers = layers
        self.blocks = nn.ModuleList(nn.Sequential(layer) for layer in layers)

    def forward(self, tokens: Tokens, mode: Mode, draws: Draws | None, recompute: bool) -> Any:
        """Output (B, L, D), and the stats of every layer."""
        inputs = (tokens.x_BLD, tokens.valid_BL, mode, draws, tokens.vocabulary_BL)
        results = [
            checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
            for layer in self.layers
        ]
        return sum(y for y, *_ in results), tuple(stats for _, stats, *_ in results)


class Notes:
    """The routing of the first layer, call by call: a router's hook and a dispatcher's wrapper."""

    def __init__(self, layer: MoE):
        self.records: list[Routing] = []
        self.plans: list[Plan] = []
        self.gates: list[Tensor] = []
        self.dispatcher: Dispatcher = layer.dispatcher
        layer.router.register_forward_hook(lambda *seen: self.records.append(seen[2]))
        layer.dispatcher = self

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Any:
        """See `Dispatcher`."""
        self.plans.append(plan)
        return self.dispatcher.dispatch(x_TD, plan)

    def combine(self, experts: Experts, arrived: Any, gate_TK: Tensor) -> Tensor:
        """See `Dispatcher`."""
        self.gates.append(gate_TK.detach())
        return self.dispatcher.combine(experts, arrived, gate_TK)

    def routes(self, calls: int) -> Routes:
        """Of the first pass through every call; recomputation comes after."""
        records, plans = self.records[:calls], self.plans[:calls]
        chosen = [r.expert_TK.masked_fill(~r.asks_TK, -1) for r in records]
        placed = [_expert_of_row(plan).take(plan.row_TK) for plan in plans]
        return Routes(torch.cat(chosen), torch.cat(placed), torch.cat(self.gates[:calls]))


def _expert_of_row(plan: Plan) -> Tensor:
    """The expert of every row of the buffer, and −1 for the row past the end."""
    rows = plan.count_E if plan.rows_per_expert is None else plan.rows_per_expert
    experts = torch.arange(len(plan.count_E)).repeat_interleave(rows)
    return F.pad(experts, (0, plan.source_R.numel() + 1 - len(experts)), value=-1)


class ShardedEngine:
    """moetrain's engine, with its tensors taken whole."""

    def __init__(self, stack: Stack, mesh: Mesh, dtype: torch.dtype):
        model: Any = stack  # it asks a model for nothing but its modules and blocks
        engine, train = EngineConfig(precision=PRECISION[dtype]), TrainConfig(clip_norm=0)
        self.engine = TorchEngine(model, mesh, 0, engine, train)
        self.model, self.weights, self.buffers = model, self.engine.weights, self.engine.buffers
        self.backward = self.engine.backward

    def whole(self, _name: str, tensor: Tensor) -> Tensor:
        """See `PlainEngine`."""
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        return whole.detach()

    @torch.no_grad()
    def set(self, _name: str, tensor: Tensor, value: Tensor) -> None:
        """See `PlainEngine`."""
        if isinstance(tensor, DTensor):
            where = tensor.device_mesh, tensor.placements
            shard = distribute_tensor(value, *where, src_data_rank=None)
            tensor.to_local().copy_(shard.to_local())
        else:
            tensor.copy_(value)

    def step(self, lr: float) -> float:
        """See `PlainEngine`."""
        return self.engine.step(lr, FINITE).grad_norm

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return self.engine.state()


class OwnLayer:
    """See `moetrain.testing.conformance.Layer`."""

    def __init__(self, kind: Kind, case: Case, config: Config, mesh: Mesh):
        self.case, self.config, self.mesh = case, config, mesh
        with torch.device("meta"):
            stack = Stack([_moe(config, layer) for layer in range(case.layers)])
        self.engine = (
            ShardedEngine(stack, mesh, case.dtype)
            if kind == "engine"
            else PlainEngine(stack, mesh, case.dtype, case.layers)
        )
        self.notes = Notes(stack.layers[0])

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.engine.weights, **self.engine.buffers}

    def state(self) -> Tensors:
        """Weights and router biases."""
        return {name: self.engine.whole(name, tensor) for name, tensor in self._tensors().items()}

    def load(self, state: Tensors) -> None:
        """Every rank takes its share."""
        for name, tensor in self._tensors().items():
            self.engine.set(name, tensor, state[name])

    def run(self, calls: list[Tokens], mode: Mode, valid_tokens: int, recompute: bool) -> Pass:
        """A training step of learning rate 0, or an evaluation."""
        counts = count_all([_counts(call) for call in calls], self.mesh)
        parts, outputs = [], []
        for number, call in enumerate(calls, 1):
            part, output_BLD = self._forward(call, mode, recompute)
            if mode == "train":
                self.engine.backward(objective(part, counts, BALANCE, Z), last=number == len(calls))
            parts.append(part.detach())
            outputs.append(output_BLD.detach())
        grads, norm = {}, None
        if mode == "train":
            grads = {
                name: self.engine.whole(name, weight.grad)
                for name, weight in self.engine.weights.items()
                if weight.grad is not None
            }
            norm = self.engine.step(lr=0.0)
        return self._pass(parts, counts, torch.cat(outputs), grads, norm)

    def _forward(self, call: Tokens, mode: Mode, recompute: bool) -> tuple[Sums, Tensor]:
        draws = Draws(step_key(0, 1), call.id_BL.flatten()) if mode == "train" else None
        with torch.set_grad_enabled(mode == "train"):
            output_BLD, stats = self.engine.model(call, mode, draws, recompute)
            wide = torch.promote_types(output_BLD.dtype, torch.float32)
            loss_BLD = (output_BLD.to(wide) * call.weight_BLD).where(call.valid_BL[:, :, None], 0)
        return sums(Output(loss_BLD.sum(), None, stats)), output_BLD

    def _pass(
        self,
        parts: list[Sums],
        counts: Counts,
        output_BLD: Tensor,
        grads: dict[str, Tensor],
        norm: float | None,
    ) -> Pass:
        means = reduce(parts, counts, self.mesh)
        line: Mapping[str, Any] = layer_line(means.layers[0], self.case.capacity_factor)
        outcomes = {name: line[name] for name in ("kept", "spilled", "dropped", "not_sampled")}
        return Pass(
            output_BLD,
            means.loss,
            means.balance_loss,
            grads,
            norm,
            self.notes.routes(len(parts)),
            means.layers[0].ledger.outcome_EKO.sum((1, 2)),
            {**outcomes, "assigned": line["assigned"]},
            line["effective_capacity_factor"],
            self._rebalanced(parts) if grads else None,
        )

    def _rebalanced(self, parts: list[Sums]) -> Tensor | None:
        """The router's bias after the step that follows an optimizer step."""
        router = next(m for m in self.engine.model.modules() if isinstance(m, Router))
        if router.gate.name != "sigmoid":
            return None
        before_E = router.bias.clone()
        router.rebalance(loads(parts, self.mesh)[0], self.config.moe.bias_update_rate)
        return router.bias - before_E

    def save(self, folder: Path) -> None:
        """One committed checkpoint."""
        assert isinstance(self.engine, ShardedEngine)
        checkpoints.save(folder, 1, self.engine.state(), {})

    def restore(self, folder: Path) -> None:
        """The newest one."""
        assert isinstance(self.engine, ShardedEngine)
        found = checkpoints.load_latest(folder, self.engine.state())
        assert found is not None


def _counts(call: Tokens) -> Counts:
    tokens, groups = call.valid_BL.sum(), call.valid_BL.any(1).sum()
    return Counts(targets=tokens, tokens=tokens, groups=groups)


def _moe(config: Config, layer: int) -> MoE:
    moe = config.moe
    return MoE(
        layer,
        config.model.dim,
        config.expert_ffn_dim,
        moe.experts,
        build_gate(moe),
        capacity_factor=training_factor(moe),
        eval_capacity_factor=moe.eval_capacity_factor,
        drop_policy=moe.drop_policy,
    )


class Own:
    """See `moetrain.testing.conformance.Adapter`."""

    name = "moetrain"
    version = "this repository"
    group: Literal["sequence", "call"] = "sequence"

    def __init__(self, kind: Kind = "layer"):
        self.kind: Kind = kind
        without = "saved by the engine, not by the layer"
        self.hidden: Mapping[str, str] = (
            {} if kind == "engine" else {"save": without, "restore": without}
        )

    def config(self, case: Case, layout: Layout) -> Config:
        """The settings of a run; raises ValidationError where they contradict each other."""
        moe = {
            "router": case.gate,
            "experts": case.experts,
            "top_k": case.top_k,
            "expert_ffn_dim": case.hidden_dim,
            "capacity_factor": case.capacity_factor,
            "eval_capacity_factor": case.capacity_factor,
            "drop_policy": case.drop_policy,
            **GATES[case.gate][2],
        }
        if not case.draws:
            moe |= {"jitter": 0.0, "random_second": False}
        sections = {
            "model": {"dim": case.dim, "heads": 1, "layers": case.layers},
            "moe": moe,
            "parallel": {"ep": layout.ep},
            "data": {"seq_len": case.length},
        }
        return Config.model_validate(sections)

    def refusal(self, case: Case, layout: Layout) -> str | None:
        """What `moetrain.constraints` says of such settings."""
        try:
            self.config(case, layout)
        except ValidationError as error:
            return "; ".join(
                detail["msg"].removeprefix("Value error, ") for detail in error.errors()
            )
        return None

    def padding(self, case: Case) -> str | None:
        """Every gate takes a mask."""
        return None

    def router(self, layer: int) -> str:
        """See `Adapter`."""
        return f"blocks.{layer}.0.router.weight"

    def experts(self, layer: int) -> str:
        """See `Adapter`."""
        return f"blocks.{layer}.0.experts."

    def connect(self, layout: Layout) -> Mesh:
        """The mesh."""
        return Mesh(torch.device("cpu"), layout.ep)

    def build(self, case: Case, layout: Layout, connection: Mesh) -> OwnLayer:
        """A stack under the engine."""
        return OwnLayer(self.kind, case, self.config(case, layout), connection)
