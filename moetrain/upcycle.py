"""What `moetrain upcycle` does: make a mixture of experts of a dense model (2212.05055).

Every expert begins as a copy of the feed-forward layer that stood there, and the router afresh.
Gates add up to 1 and nothing is dropped, so the model begins as the dense one: same logits. So it
does where each expert is then cut into finer ones (2410.07524; see `moetrain.resize`).

Shape suffixes: E experts, D model width, F hidden width of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from moetrain import settings
from moetrain.build import build_model
from moetrain.config import Config
from moetrain.errors import UserError
from moetrain.hf.importing import opened, write
from moetrain.hf.names import SOURCE
from moetrain.model import Transformer, initial_value
from moetrain.resize import cut

EXPERTS, DENSE = ".moe.experts.", ".feed_forward."


def upcycle(
    dense: str,
    out: Path,
    experts: int,
    top_k: int,
    every: int = 1,
    split: int = 1,
    noise: float = 0.0,
    seed: int = 0,
    tokenizer: str | None = None,
) -> None:
    """Write the folder `out`, which must not exist, with a checkpoint of step 0.

    `dense` is a model of Hugging Face in the format llama, mistral or qwen3: a folder, or a name on
    the hub. Every `every`-th block gets `experts` experts, of which a token chooses `top_k`; each
    is then cut into `split` ones of a `split`-th of its width, of which it chooses all.
    `noise` is the standard deviation of what is added to every expert, over that which its matrices
    would have been initialised with; `seed` draws it, and the routers. Two parameters at a time are
    in memory. For `tokenizer`, and for what is raised, see `hf.importing.import_model`; UserError
    too where the model has experts already, or cannot have such ones.
    """
    with opened(dense, tokenizer) as source:
        if source.config.moe.experts:
            raise UserError(f"{dense} has experts already; upcycle a dense model")
        config = with_experts(source.config, experts, top_k, every, seed)
        model = build_model(config, source.tokenizer.vocab_size)
        make = maker(model, source.make, noise, seed)
        if split > 1:
            config, make = cut(config, make, split, "cut")
        beside = {file: path for file, path in source.beside.items() if file != SOURCE}
        write(out, config, source._replace(make=make, beside=beside))


def with_experts(config: Config, experts: int, top_k: int, every: int, seed: int) -> Config:
    """The settings of the sparse model; UserError where they contradict each other."""
    sections = config.model_dump()
    sections["seed"] = seed
    sections["moe"] |= {
        "experts": experts,
        "top_k": top_k,
        "every": every,
        "router": "topk",
        "renormalize": True,
        "expert_ffn_dim": config.model.dense_ffn_dim,
        "capacity_factor": None,
        "eval_capacity_factor": None,
    }
    return settings.resolve(None, sections)


def maker(
    model: Transformer, dense: Callable[[str], Tensor], noise: float, seed: int
) -> Callable[[str], Tensor]:
    """What makes the parameters of a sparse model from those of the dense one, by name."""
    modules, num_layers = dict(model.named_modules()), len(model.blocks)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def fresh(name: str) -> Tensor:
        module, shape = modules[name.rpartition(".")[0]], shapes[name]
        return initial_value(module, name, shape, seed, num_layers, range(shape[0]))

    def make(name: str) -> Tensor:
        if name.endswith(".moe.router.weight"):
            return fresh(name)
        if EXPERTS not in name:
            return dense(name)
        matrix = dense(f"{name.replace(EXPERTS, DENSE)}.weight").mT  # ours are (in, out)
        copies = matrix.expand(shapes[name]).contiguous()
        return copies.add_(fresh(name), alpha=noise) if noise else copies

    return make
