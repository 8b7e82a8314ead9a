"""DeepSpeed's MoE layer (deepspeed.moe.layer.MoE) under the conformance suite, on CPU with Gloo.

Converted first, so that both mean the same: its factor is multiplied by K in the gate for K > 1
already, `min_capacity` is 1 rather than 4, and random choices are off (use_rts,
top2_2nd_expert_sampling) but in cases that ask for draws. Its routing group is a rank's call. The
loss handed to its engine is such that its mean over ranks and calls is the objective.

Shape suffixes: B sequences, L tokens, T = B·L, D model width, F hidden width, K choices, E experts.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapters.connection import connect_deepspeed
from moetrain.testing.conformance import Case, Layout, Mode, Pass, Routes, Tensors, Tokens

BALANCE = 0.1
GATES = {"top1": 1, "top2": 2, "topk": 4}
"""K of every gate: TopKGate takes another function for 1, 2 and more."""


def case(gate: str, **changes: Any) -> Case:
    """The case in which a gate is tested, unless it says otherwise."""
    changes = {"top_k": GATES[gate], "dtype": torch.float32, **changes}
    return Case(gate, chooses="logits", **changes)


class Expert(nn.Module):
    """The network that DeepSpeed copies."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape out."""
        return self.down(F.silu(self.up(x)))


class Stack(nn.Module):
    """MoE layers beside each other: all get the same input, their outputs are added."""

    def __init__(self, case: Case, ep: int):
        super().__init__()
        from deepspeed.moe.layer import MoE

        dropless = case.capacity_factor is None
        factor = 1.0 if case.capacity_factor is None else case.capacity_factor
        self.blocks = nn.ModuleList(
            MoE(
                case.dim,
                Expert(case.dim, case.hidden_dim),
                num_experts=case.experts,
                ep_size=ep,
                k=case.top_k,
                capacity_factor=factor,
                eval_capacity_factor=factor,
                min_capacity=1,
                drop_tokens=not dropless,
                use_rts=case.draws,
                top2_2nd_expert_sampling=case.draws,
            )
            for _ in range(case.layers)
        )

    def forward(self, x_BLD: Tensor, used_T: Tensor | None, recompute: bool) -> Any:
        """Output, and l_aux and exp_counts of every layer."""
        results = [
            checkpoint(block, x_BLD, used_T, use_reentrant=False)
            if recompute
            else block(x_BLD, used_T)
            for block in self.blocks
        ]
        return sum(y for y, _, _ in results), [seen[1:] for seen in results]


class PeerLayer:
    """See `moetrain.testing.conformance.Layer`."""

    def __init__(self, case: Case, layout: Layout, stage: int):
        import deepspeed
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        self.case, self.layout, self.stage = case, layout, stage
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            stack = Stack(case, layout.ep)
            group = {"params": list(stack.parameters()), "name": "all"}
            groups: Any = split_params_into_different_moe_groups_for_optimizer(group)
            self.engine: Any = deepspeed.initialize(
                model=stack,
                model_parameters=groups,
                config=_settings(case, layout, stage),
                dist_init_required=False,
            )[0]
        self.model: Stack = self.engine.module
        self.weights = _logical(self.model)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.model.blocks[0].deepspeed_moe.gate.register_forward_hook(self._note)  # type: ignore[union-attr]

    def _note(self, gate: Any, inputs: Any, output: Any) -> None:
        """The routes that the gate hands to dispatch, and those it would without drops."""
        placed_TK, gate_TK = output[3].T.long(), output[5].T.detach()
        chosen_TK = placed_TK
        if gate.drop_tokens and not self.case.draws:
            gate.drop_tokens = False
            with torch.no_grad():
                chosen_TK = gate.forward(inputs[0], inputs[1], True)[3].T.long()
            gate.drop_tokens = True
        self.seen.append((chosen_TK, placed_TK, gate_TK))

    def _whole(self, name: str, tensors: list[Tensor]) -> Tensor:
        """A logical tensor: that of all experts, or the router's."""
        if ".experts." not in name:
            return tensors[0].detach().clone()
        mine = torch.stack([tensor.detach() for tensor in tensors])
        parts = [torch.empty_like(mine) for _ in range(self.layout.ep)]
        from deepspeed.utils import groups

        dist.all_gather(parts, mine, group=groups._get_expert_parallel_group(self._group()))
        return torch.cat(parts)

    def _group(self) -> str:
        return f"ep_size_{self.layout.ep}"

    def state(self) -> Tensors:
        """The weights in compute precision."""
        return {name: self._whole(name, list(ps)) for name, ps in self.weights.items()}

    @torch.no_grad()
    def load(self, state: Tensors) -> None:
        """Every rank takes its experts."""
        first = (dist.get_rank() % self.layout.ep) * (self.case.experts // self.layout.ep)
        for name, parameters in self.weights.items():
            is_expert = ".experts." in name
            for number, parameter in enumerate(parameters):
                parameter.copy_(state[name][first + number] if is_expert else state[name])

    def run(self, calls: list[Tokens], mode: Mode, valid_tokens: int, recompute: bool) -> Pass:
        """One step up to the update, or an evaluation."""
        self.engine.train(mode == "train")
        self.seen.clear()
        scale = self.layout.ranks * self.layout.calls / valid_tokens
        outputs, loss, auxiliary, load_E = [], torch.zeros(()), torch.zeros(()), None
        for call in calls:
            used_T = call.valid_BL.flatten().long() if self.case.top_k == 1 else None
            with torch.set_grad_enabled(mode == "train"):
                output_BLD, layers = self.engine(call.x_BLD, used_T, recompute)
            valid_BL1 = call.valid_BL[:, :, None]
            loss_sum = (output_BLD.float() * call.weight_BLD).where(valid_BL1, 0).sum()
            balance = torch.stack([l_aux for l_aux, _ in layers]).mean()
            if mode == "train":
                self.engine.backward(scale * loss_sum + BALANCE * balance)
                if call is not calls[-1]:
                    self.engine.step()
            outputs.append(output_BLD.detach())
            loss += loss_sum.detach() / valid_tokens
            auxiliary += balance.detach() / (self.layout.ranks * self.layout.calls)
            load_E = layers[0][1] if load_E is None else load_E + layers[0][1]
        grads, norm = self._gradients() if mode == "train" else ({}, None)
        assert load_E is not None
        for total in (loss, auxiliary, load_E):
            dist.all_reduce(total)
        routes = Routes(*(torch.cat(part) for part in zip(*self.seen[: len(calls)], strict=True)))
        return Pass(
            torch.cat(outputs),
            loss.item(),
            auxiliary.item(),
            grads,
            norm,
            routes,
            load_E,
            outcomes=None,
            effective_factor=None,
        )

    def _gradients(self) -> tuple[dict[str, Tensor], float]:
        """What the optimizer gets, and the norm that clipping divides by."""
        from deepspeed.runtime.utils import clip_grad_norm_
        from deepspeed.utils import safe_get_full_grad

        grads = {}
        for name, parameters in self.weights.items():
            found = [safe_get_full_grad(parameter) for parameter in parameters]
            if all(grad is not None for grad in found):
                grads[name] = self._whole(name, found)  # type: ignore[arg-type]
        if self.stage == 0:  # what its step does, and keeps to itself
            norm = clip_grad_norm_(parameters=self.model.parameters(), max_norm=1e9)
            self.engine.zero_grad()
            return grads, float(norm)
        self.engine.step()
        return grads, float(self.engine.get_global_grad_norm())

    def save(self, folder: Path) -> None:
        """Its own checkpoint."""
        self.engine.save_checkpoint(str(folder), tag="saved")

    def restore(self, folder: Path) -> None:
        """The weights of its own checkpoint."""
        self.engine.load_checkpoint(str(folder), tag="saved", load_module_only=True)


def _logical(stack: Stack) -> dict[str, list[nn.Parameter]]:
    """This rank's parameters by logical name: one, or one for each of its experts."""
    named: dict[str, list[nn.Parameter]] = {}
    for number, block in enumerate(stack.blocks):
        layer: Any = block.deepspeed_moe
        named[f"{number}.gate.wg.weight"] = [layer.gate.wg.weight]
        for expert in layer.experts.deepspeed_experts:
            for name, parameter in expert.named_parameters():
                named.setdefault(f"{number}.experts.{name}", []).append(parameter)
    return named


def _settings(case: Case, layout: Layout, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": layout.calls,
        "gradient_clipping": 1e9,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": case.dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }


class Peer:
    """See `moetrain.testing.conformance.Adapter`."""

    name = "DeepSpeed"
    group: Literal["sequence", "call"] = "call"
    hidden: Mapping[str, str] = {
        "outcomes": "drops are not counted",
        "effective_factor": "the effective capacity factor is not reported",
    }

    def __init__(self, stage: int = 0):
        self.stage = stage
        self.version = version("deepspeed")

    def refusal(self, case: Case, layout: Layout) -> str | None:
        """A gate's number of choices is its name here; the gate itself is fp32 at most."""
        legal = {"top1": case.top_k == 1, "top2": case.top_k == 2, "topk": case.top_k > 2}
        if not legal[case.gate]:
            return f"top_k {case.top_k} is another gate than {case.gate}"
        if case.dtype == torch.float64:
            return "the gate computes in fp32"
        return None

    def padding(self, case: Case) -> str | None:
        """`used_token` reaches top1gating alone."""
        return None if case.top_k == 1 else "`used_token` has no effect for k > 1"

    def router(self, layer: int) -> str:
        """See `Adapter`."""
        return f"{layer}.gate.wg.weight"

    def experts(self, layer: int) -> str:
        """See `Adapter`."""
        return f"{layer}.experts."

    def connect(self, layout: Layout) -> None:
        """See `connect_deepspeed`."""
        connect_deepspeed(on_cpu=True)

    def build(self, case: Case, layout: Layout, connection: None) -> PeerLayer:
        """A stack under DeepSpeed's engine."""
        return PeerLayer(case, layout, self.stage)
