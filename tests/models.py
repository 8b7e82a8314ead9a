"""Small whole models on the CPU, initialised as training initialises them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.build import build_model
from moetrain.config import Config
from moetrain.model import Transformer, initial_value

VOCAB = 64
SMALL: dict[str, dict[str, Any]] = {
    "model": {"dim": 16, "layers": 2, "heads": 4, "ffn_dim": 24},
    "moe": {"experts": 4, "top_k": 2, "expert_ffn_dim": 12},
    "data": {"seq_len": 8},
}


def small_config(**sections: Any) -> Config:
    """`SMALL` with other values over it, section by section: model={"dim": 32}."""
    fields = {name: value for name, value in sections.items() if name not in SMALL}
    merged = {name: {**values, **sections.get(name, {})} for name, values in SMALL.items()}
    return Config.model_validate({**merged, **fields})


def initialised(
    config: Config, dtype: torch.dtype = torch.float64, vocab_size: int = VOCAB
) -> Transformer:
    """The model of a configuration with its initial values, on one device."""
    model = build_model(config, vocab_size).to_empty(device="cpu").to(dtype)
    experts = range(config.moe.experts)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                value = initial_value(
                    module, name, parameter.shape, config.seed, config.model.layers, experts
                )
                parameter.copy_(value)
    return model


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def follower(successor: dict[int, int]) -> tuple[Config, Transformer]:
    """A model that says after each byte the one that follows it here, and else the end of text.

    Likeliest of all, always, is the last row of its vocabulary, which is padding.
    """
    config = small_config(
        model={
            "dim": 258,
            "layers": 1,
            "heads": 1,
            "tie_embeddings": False,
            "vocab_size": 320,
        },
        moe={"experts": 0},
    )
    model = initialised(config, torch.float32, vocab_size=257)
    model.blocks[0].attention.wo.weight.zero_()  # type: ignore[union-attr]
    model.blocks[0].feed_forward.w_down.weight.zero_()  # type: ignore[union-attr]
    model.embedding.weight.copy_(torch.eye(320, 258))
    assert model.head is not None
    model.head.weight.zero_()
    for byte in range(256):
        model.head.weight[successor.get(byte, 256), byte] = 1
    model.head.weight[-1] = 2
    return config, model
