"""What a configuration means on a number of ranks, worked out without starting any."""

from __future__ import annotations

from collections.abc import Iterator

from moetrain.build import build_model
from moetrain.config import Config
from moetrain.data import load_tokenizer
from moetrain.model import Block, Transformer
from moetrain.moe import capacity
from moetrain.sizes import sizes, train_flops_per_token

_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}


def report(config: Config, world_size: int) -> str:
    """Mesh, layers, parameters, tokens per step and memory per device, as text.

    The configuration must have passed `config.check_world`. Raises UserError where the tokenizer
    cannot be loaded.
    """
    vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    model = build_model(config, vocab_size)
    sections = (
        _mesh(config, world_size),
        _layers(config, model),
        _parameters(config, model),
        _step(config, world_size),
        _memory(config, model, world_size),
    )
    return "\n\n".join("\n".join(section) for section in sections)
