"""A trained model back from its checkpoint, for evaluation and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from moetrain import checkpoint, settings
from moetrain.build import build_model
from moetrain.config import Config
from moetrain.data import Tokenizer, load_tokenizer
from moetrain.errors import UserError
from moetrain.hf.names import TEMPLATE_FILE
from moetrain.mesh import Mesh
from moetrain.model import Transformer
from moetrain.parallel import parallelize
from moetrain.precision import computes_in

TOKENIZER_FILE = "tokenizer.json"


class Checkpoint(NamedTuple):
    """A checkpoint found, not yet loaded."""

    path: Path
    step: int
    config: Config
    vocab_size: int
    tokenizer_fingerprint: str
    data_fingerprint: str | None
    """None where it was trained elsewhere, on text that is not known here."""


def find(path: Path | str) -> Checkpoint:
    """The checkpoint that a run's folder or a checkpoint's own stands for, and what it says.

    Its tokenizer and chat template are the run's own copies, where there are such. Raises UserError
    where there is no checkpoint.
    """
    found = checkpoint.resolve(path)
    manifest = checkpoint.read_manifest(found)
    extra: dict[str, Any] = manifest.extra
    config = settings.resolve(None, extra["config"])
    home = found.parent.parent
    copies: dict[str, Any] = {}
    if (home / TOKENIZER_FILE).exists():
        copies["tokenizer"] = str(home / TOKENIZER_FILE)
    if (home / TEMPLATE_FILE).exists():
        copies["chat_template"] = home / TEMPLATE_FILE
    config = config.model_copy(update={"data": config.data.model_copy(update=copies)})
    return Checkpoint(
        found,
        manifest.step,
        config,
        vocab_size=extra["vocab_size"],
        tokenizer_fingerprint=extra["tokenizer"],
        data_fingerprint=extra["order"]["data"],
    )


def model_on_mesh(found: Checkpoint, mesh: Mesh) -> Transformer:
    """The model spread over a mesh as in training, for any mesh."""
    config = found.config
    model = build_model(config, found.vocab_size)
    parallelize(model, mesh, computes_in(config.engine), config.seed)
    _load(found, model)
    return model


def model_on_device(found: Checkpoint, device: torch.device) -> Transformer:
    """The whole model on one device, in fp32 (fp64 for a run in fp64)."""
    model = build_model(found.config, found.vocab_size).to_empty(device=device)
    if found.config.engine.precision == "fp64":
        model.double()
    _load(found, model)
    return model


def _load(found: Checkpoint, model: Transformer) -> None:
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {f"model.{name}": value.detach() for name, value in named}
    limit = found.config.checkpoint.hash_limit_gib
    checkpoint.load(found.path, tensors, prefix="model.", hash_limit_gib=limit)


def tokenizer(found: Checkpoint) -> Tokenizer:
    """The tokenizer the model was trained with; UserError when it is another one by now."""
    loaded = load_tokenizer(found.config.data.tokenizer)
    check_tokenizer(found, loaded)
    return loaded


def check_tokenizer(found: Checkpoint, loaded: Tokenizer) -> None:
    """Raise UserError unless it is the tokenizer that the checkpoint was trained with."""
    if loaded.fingerprint != found.tokenizer_fingerprint:
        raise UserError(
            f"data.tokenizer ({found.config.data.tokenizer}) is no longer the one that "
            f"{found.path} was trained with; put it back (a run keeps a copy as {TOKENIZER_FILE})"
        )
