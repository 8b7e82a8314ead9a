"""The layers of other systems around the weights of a cell, as their users would set them up.

Shape suffixes: L tokens of this rank as one sequence, T tokens, D model width, K choices.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from adapters.connection import connect_deepspeed
from harness import AbsentError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from contenders.case import LayerCase, Seen, heard
from contenders.cell import DTYPES, Cell, Weights, weights
from contenders.own import FACTOR

FOLDER = Path(__file__).parents[1] / ".peers"
"""Where requirements-peers.txt is installed."""
INSTALL = "install benchmarks/requirements-peers.txt as it says"


# ---- DeepSpeed -----------------------------------------------------------------------------------


class Expert(nn.Module):
    """The network that DeepSpeed copies, and a list of which it calls one by one."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape out."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class DeepSpeedLayer:
    """See `contenders.case.Layer`. Its factor is multiplied by K in the gate; nothing is drawn."""

    def __init__(self, cell: Cell, device: torch.device):
        connect_deepspeed(on_cpu=device.type == "cpu")
        from deepspeed.moe.layer import MoE

        shape = cell.shape
        with device, contextlib.redirect_stdout(io.StringIO()):
            self.module = MoE(
                shape.dim,
                Expert(shape.dim, shape.expert_dim),
                num_experts=shape.experts,
                ep_size=cell.ranks,
                k=shape.top_k,
                capacity_factor=FACTOR,
                min_capacity=1,
                use_rts=False,
                top2_2nd_expert_sampling=False,
            )
            self.module.set_deepspeed_parallelism()
        self.inner: Any = self.module.deepspeed_moe
        self.inner.experts.to(DTYPES[cell.dtype])
        self._load(weights(cell, dist.get_rank(), device))

    @torch.no_grad()
    def _load(self, given: Weights) -> None:
        self.inner.gate.wg.weight.copy_(given.router_ED)
        experts = self.inner.experts.deepspeed_experts
        for expert, *parts in zip(experts, given.gate_up_eDF, given.down_eFD, strict=True):
            expert.gate_up.weight.copy_(parts[0].T)
            expert.down.weight.copy_(parts[1].T)

    def forward(self, x_1LD: Tensor) -> tuple[Tensor, Tensor]:
        """See `Layer`."""
        y_1LD, loss, _ = self.module(x_1LD)
        return y_1LD, loss

    def look(self, x_1LD: Tensor) -> Seen:
        """See `Layer`; what was dropped cannot be seen."""
        answer = heard(self.inner.gate, lambda: self.module(x_1LD))
        if len(answer) == 4:  # masks (T, E, C)
            is_placed_TE = answer[2].any(2)
            kept = int(is_placed_TE.sum())
            if kept < len(is_placed_TE) * self.inner.gate.k:
                return Seen(None, kept)
            return Seen(is_placed_TE.nonzero()[:, 1].view(len(is_placed_TE), -1), kept)
        chosen_TK = answer[3].T.long()
        return Seen(chosen_TK, int((chosen_TK >= 0).sum()))


def deepspeed(cell: Cell, device: torch.device) -> LayerCase:
    """As it is installed: rows go to slots by index (from 0.19.4 on)."""
    return LayerCase(cell, device, DeepSpeedLayer(cell, device))


MASK_BYTES = {"fp32": (16, 36), "bf16": (12, 32)}
"""Measured: what a step takes beyond the layer above for every entry of its (T, E, C) masks; with
up to two choices for each token, and with more."""


def deepspeed_einsum(cell: Cell, device: torch.device) -> LayerCase:
    """The last one that multiplies tokens by masks."""
    if not (FOLDER / "deepspeed").is_dir():
        raise AbsentError(f"not installed; {INSTALL}")
    shape, num_tokens = cell.shape, cell.tokens // cell.ranks
    slots = FACTOR * shape.top_k * num_tokens / shape.experts
    of_entry = MASK_BYTES[cell.dtype][shape.top_k > 2]
    needed = of_entry * num_tokens * shape.experts * slots * cell.ranks
    there = _memory(device)
    if needed > there / 2:  # those that are built later need some, too
        mask = f"{num_tokens}×{shape.experts}×{slots:.0f}"
        raise AbsentError(
            f"its {mask} masks take about {needed / 2**30:.0f} GiB, {there / 2**30:.0f} are there"
        )
    return LayerCase(cell, device, DeepSpeedLayer(cell, device))


def _memory(device: torch.device) -> int:
    """Bytes that are free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


# ---- Hugging Face --------------------------------------------------------------------------------


class HuggingFaceLayer:
    """See `contenders.case.Layer`. Mixtral's block; its router is in the dtype of the rest."""

    def __init__(self, cell: Cell, device: torch.device, kind: Literal["eager", "grouped_mm"]):
        try:
            from transformers.models.mixtral.modeling_mixtral import (
                MixtralConfig,
                MixtralSparseMoeBlock,
            )
        except ImportError as error:
            raise AbsentError(f"{error}; pip install 'moetrain[hf]'") from None
        shape = cell.shape
        settings: dict[str, Any] = {
            "hidden_size": shape.dim,
            "intermediate_size": shape.expert_dim,
            "num_local_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "experts_implementation": kind,
        }
        with device:
            self.module: Any = MixtralSparseMoeBlock(MixtralConfig(**settings)).to(
                DTYPES[cell.dtype]
            )
        if not hasattr(self.module.experts, "gate_up_proj"):
            raise AbsentError("transformers is older than 5; pip install 'transformers>=5'")
        given = weights(cell, dist.get_rank(), device)
        with torch.no_grad():
            self.module.gate.weight.copy_(given.router_ED)
            self.module.experts.gate_up_proj.copy_(given.gate_up_eDF.mT)
            self.module.experts.down_proj.copy_(given.down_eFD.mT)

    def forward(self, x_1LD: Tensor) -> tuple[Tensor, None]:
        """See `Layer`. A model computes the auxiliary loss of all layers at once, elsewhere."""
        return self.module(x_1LD), None

    def look(self, x_1LD: Tensor) -> Seen:
        """See `Layer`."""
        chosen_TK = heard(self.module.gate, lambda: self.module(x_1LD))[2]
        return Seen(chosen_TK, chosen_TK.numel())


def hugging_face_eager(cell: Cell, device: torch.device) -> LayerCase:
    """Expert by expert."""
    return LayerCase(cell, device, HuggingFaceLayer(cell, device, "eager"))


def hugging_face_grouped(cell: Cell, device: torch.device) -> LayerCase:
    """Sorted, with grouped products."""
    return LayerCase(cell, device, HuggingFaceLayer(cell, device, "grouped_mm"))


# ---- torchtitan ----------------------------------------------------------------------------------


class TitanLayer:
    """See `contenders.case.Layer`. Softmax, renormalised, without the bias that balances."""

    def __init__(self, cell: Cell, device: torch.device):
        if cell.dtype != "bf16":
            raise AbsentError("its experts compute in bf16, whatever the dtype of tokens")
        try:
            linear, moe, dispatchers = (
                importlib.import_module(f"torchtitan.models.common.{name}")
                for name in ("linear", "moe", "token_dispatcher")
            )
        except ImportError as error:
            raise AbsentError(f"{error}; {INSTALL}") from None
        # Its fp32 region around the router is one that torch does not know on CPUs.
        warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)
        shape, local = cell.shape, cell.shape.experts // cell.ranks
        dispatcher: Any = dispatchers.LocalTokenDispatcher
        if cell.ranks > 1:
            dispatcher = dispatchers.AllToAllTokenDispatcher
        config = moe.MoE.Config(
            num_experts=shape.experts,
            routed_experts=moe.RoutedExperts.Config(
                inner_experts=moe.GroupedExperts.Config(
                    dim=shape.dim, hidden_dim=shape.expert_dim, num_experts=local
                ),
                token_dispatcher=dispatcher.Config(num_experts=shape.experts, top_k=shape.top_k),
            ),
            router=moe.TokenChoiceTopKRouter.Config(
                num_experts=shape.experts,
                gate=linear.Linear.Config(in_features=shape.dim, out_features=shape.experts),
                top_k=shape.top_k,
                score_func="softmax",
                route_norm=True,
            ),
            load_balance_coeff=None,
        )
        with device:
            self.module: Any = config.build()
        for parameter in self.module.parameters():
            parameter.data = parameter.data.to(DTYPES[cell.dtype])
        self._load(weights(cell, dist.get_rank(), device))
        if cell.ranks > 1:
            # Of its backends one whose all-to-all takes rows of uneven number under Gloo, too.
            importlib.import_module("torchtitan.distributed.utils").set_spmd_backend(
                "partial_dtensor"
            )
            mesh = init_device_mesh(device.type, (cell.ranks,))
            self.module.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)

    @torch.no_grad()
    def _load(self, given: Weights) -> None:
        self.module.router.gate.weight.copy_(given.router_ED)
        gate_eDF, up_eDF = given.gate_up_eDF.chunk(2, dim=-1)
        experts = self.module.routed_experts.inner_experts
        experts.w1_EFD.copy_(gate_eDF.mT)
        experts.w3_EFD.copy_(up_eDF.mT)
        experts.w2_EDF.copy_(given.down_eFD.mT)

    def forward(self, x_1LD: Tensor) -> tuple[Tensor, None]:
        """See `Layer`. It has no auxiliary losses."""
        return self.module(x_1LD), None

    def look(self, x_1LD: Tensor) -> Seen:
        """See `Layer`."""
        chosen_1LK = heard(self.module.router, lambda: self.module(x_1LD))[1]
        return Seen(chosen_1LK[0], chosen_1LK.numel())


def torchtitan(cell: Cell, device: torch.device) -> LayerCase:
    """Grouped products of sorted tokens."""
    return LayerCase(cell, device, TitanLayer(cell, device))
