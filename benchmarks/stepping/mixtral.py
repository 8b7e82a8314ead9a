"""Hugging Face's Mixtral, trained by plain PyTorch: the loop that one writes without a framework.

fp32 weights, `torch.autocast` where the precision is bf16, fused AdamW, `clip_grad_norm_`, and
`DistributedDataParallel` where there are several ranks, all of which hold all experts. Autocast
does not know grouped products, which would be of fp32: there the experts' weights are rounded by
hand. It reads the batches that moetrain's step reads, and starts from the same weights.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from harness import AbsentError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from moetrain.build import build_model
from moetrain.config import Config
from moetrain.data import Batch, Samples, prepare
from moetrain.hf.formats import settings_of
from moetrain.hf.tensors import PLAIN
from moetrain.optim import decays
from moetrain.parallel import initial_values
from moetrain.precision import computes_in
from moetrain.step import Position
from stepping.own import after, batches, count, first_batch, mesh_of
from stepping.shapes import Cell, config_of

Kind = Literal["eager", "grouped_mm"]
"""How transformers multiplies by its experts."""


class MixtralStep:
    """Model, optimizer and data."""

    def __init__(self, cell: Cell, device: torch.device, kind: Kind):
        self.config = config = config_of(cell, capacity_factor=None)
        self.device, self.position = device, Position()
        prepared = prepare(config.data)
        self.samples = Samples(prepared, "train", config.data.seq_len, config.seed, False)
        vocab_size = config.model.vocab_size or prepared.manifest.vocab_size
        self.model = mixtral(config, vocab_size, kind, device)
        self.model.load_state_dict(renamed(first_weights(config, vocab_size, device)))
        if kind == "grouped_mm":
            cast_experts(self.model)
        self.optimizer = adamw(self.model, config)
        self.trained = self.model
        if cell.ranks > 1:
            self.trained = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def step(self) -> None:
        """One optimizer step on the next batch."""
        ranks = dist.get_world_size()
        num_batches = self.config.accumulation(ranks)
        read = batches(self.config, self.samples, self.position, self.device)
        is_low = computes_in(self.config.engine) == "bf16"
        for number, batch in enumerate(read, start=1):
            low = torch.autocast(self.device.type, torch.bfloat16, enabled=is_low)
            is_early = ranks > 1 and number < num_batches
            with self.trained.no_sync() if is_early else nullcontext():
                with low, parametrize.cached():
                    loss = outputs(self.trained, batch).loss
                (loss / num_batches).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.position = after(self.position, self.config)

    @torch.no_grad()
    def facts(self) -> dict[str, float]:
        """What `OwnStep.facts` tells."""
        found = outputs(self.model, first_batch(self.samples, self.device))
        balance = self.model.config.router_aux_loss_coef * found.aux_loss
        return {"parameters": count(self.model), "loss": (found.loss - balance).item()}


def eager_step(cell: Cell, device: torch.device) -> MixtralStep:
    """One expert after the other."""
    return MixtralStep(cell, device, "eager")


def grouped_step(cell: Cell, device: torch.device) -> MixtralStep:
    """torch's grouped matrix product."""
    return MixtralStep(cell, device, "grouped_mm")


def mixtral(config: Config, vocab_size: int, kind: Kind, device: torch.device) -> Any:
    """Their model of the shape of ours, ready to be trained."""
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError as error:
        raise AbsentError(f"transformers cannot be imported ({error})") from None
    if not hasattr(MixtralForCausalLM, "set_experts_implementation"):
        raise AbsentError("transformers is older than 5 and knows no experts_implementation")
    settings = settings_of("mixtral", config, vocab_size, eos_id=None)
    shape = MixtralConfig(**{**settings, "output_router_logits": True, "use_cache": False})
    with device:
        built = MixtralForCausalLM._from_config(shape, attn_implementation="sdpa")
    built.set_experts_implementation(kind)
    return built.train()


class AsAutocast(nn.Module):
    """A weight as `torch.autocast` gives it to the products that it knows."""

    def forward(self, weight: Tensor) -> Tensor:
        kind = weight.device.type
        is_low = torch.is_autocast_enabled(kind)
        return weight.to(torch.get_autocast_dtype(kind)) if is_low else weight


def cast_experts(model: nn.Module) -> None:
    """Let grouped products have what others have under autocast."""
    experts = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    for module in experts:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(module, name, AsAutocast())


def outputs(model: Any, batch: Batch) -> Any:
    """Their forward pass, to the loss of the same targets."""
    targets = batch.targets_BL
    return model(input_ids=batch.tokens_BL, labels=targets, shift_labels=targets)


def adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """The optimizer of a moetrain run, as one writes it by hand."""
    train = config.train
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if decays(p)], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]
    betas = train.beta1, train.beta2
    return torch.optim.AdamW(groups, lr=train.lr, betas=betas, eps=train.adam_eps, fused=True)


def first_weights(config: Config, vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """What a moetrain run of this configuration starts from."""
    model = build_model(config, vocab_size)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    values = initial_values(model, mesh_of(device, ep=1), config.seed)
    return {names[id(parameter)]: value for _, parameter, value in values}


INSIDE = {
    **PLAIN,
    "moe.router.weight": "mlp.gate.weight",
    "moe.experts.w_gate_up": "mlp.experts.gate_up_proj",
    "moe.experts.w_down": "mlp.experts.down_proj",
}
"""Ours and theirs, inside a layer, as their model holds them: the experts in two tensors."""


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights as a state of their model; their experts' matrices are ours transposed."""
    embedding = weights["embedding.weight"]
    theirs = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": weights.get("head.weight", embedding),
        "model.norm.weight": weights["norm.weight"],
    }
    for name, weight in weights.items():
        if name.startswith("blocks."):
            _, layer, inside = name.split(".", 2)
            turned = weight.mT if ".experts." in name else weight
            theirs[f"model.layers.{layer}.{INSIDE[inside]}"] = turned
    return theirs
