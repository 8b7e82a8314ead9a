"""What `moetrain export` does: write a checkpoint as a model of Hugging Face."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain import restore
from moetrain.checkpoint.checks import is_model
from moetrain.checkpoint.manifest import Manifest
from moetrain.checkpoint.reading import open_checkpoint, read_tensor
from moetrain.config import Config
from moetrain.convert import SHARD_BYTES, write_safetensors, written_beside
from moetrain.data import BYTES, Tokenizer, bytes_as_json
from moetrain.errors import UserError
from moetrain.hf.bar import bar
from moetrain.hf.formats import approximations, refusals, settings_of
from moetrain.hf.names import (
    CONFIG,
    GENERATION,
    KEPT,
    SOURCE,
    TOKENIZER_CONFIG,
    DtypeName,
    FormatName,
)
from moetrain.hf.tensors import Part, parts, require_none
from moetrain.restore import TOKENIZER_FILE

DTYPES: dict[DtypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    path: Path,
    out: Path,
    name: FormatName,
    dtype: DtypeName = "bf16",
    approximate: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write the model of a checkpoint to the folder `out`, which must not exist; verified first.

    `path` names a run (its newest checkpoint) or a checkpoint. The folder has config.json,
    generation_config.json, the tokenizer, and tensors of `dtype` in safetensors of at most
    `shard_bytes` each; one file at a time is in memory, twice, and a tensor of the checkpoint. What
    an imported model had beside its tensors is there as it was.
    Returns in which ways the model is another one there.

    Raises UserError where the format cannot express the model, or only approximately and
    `approximate` is False, where tensors are missing or have no place in the format, and where
    `out` is in the way or cannot be written; it is then not there.
    """
    found = restore.find(path)
    config, manifest = found.config, open_checkpoint(found.path, hashed=True)
    if reasons := refusals(name, config):
        raise UserError("\n".join(reasons))
    stated = approximations(config)
    if stated and not approximate:
        told = "\n".join(f"{name}: {line}" for line in stated)
        raise UserError(f"{told}\nexport it all the same with --approximate")
    wanted = list(parts(name, config))
    _require_alike(wanted, manifest)
    tokenizer = restore.tokenizer(found)
    vocab_size = manifest.tensors["model.embedding.weight"].shape[0]
    home = found.path.parent.parent
    source = json.loads((home / SOURCE).read_text("utf-8")) if (home / SOURCE).exists() else None
    described = settings_of(name, config, vocab_size, tokenizer.eos_id, source)
    torch_name = str(DTYPES[dtype]).removeprefix("torch.")
    with written_beside(out) as place:
        _write_tensors(place, found.path, manifest, wanted, DTYPES[dtype], shard_bytes)
        _write_json(place / CONFIG, {**described, "dtype": torch_name})
        _write_json(place / GENERATION, {"eos_token_id": tokenizer.eos_id})
        _write_tokenizer(place, config, tokenizer)
        for file in KEPT:
            if file != SOURCE and (home / file).exists():
                shutil.copyfile(home / file, place / file)
    return stated


def _require_alike(wanted: Sequence[Part], manifest: Manifest) -> None:
    """UserError with the list of tensors that are missing or have no place in the format."""
    needed = {f"model.{part.ours}" for part in wanted}
    there = {name for name in manifest.tensors if is_model(name)}
    require_none(
        {
            "missing in the checkpoint": needed - there,
            "without a place in the format": there - needed,
        }
    )


def _write_tensors(
    place: Path,
    found: Path,
    manifest: Manifest,
    wanted: Sequence[Part],
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    by_name = {part.name: part for part in wanted}

    @lru_cache(maxsize=1)  # the experts of a layer are parts of one tensor
    def ours(name: str) -> Tensor:
        return read_tensor(found, manifest.tensors[f"model.{name}"])

    with torch.device("meta"):
        shapes = {
            part.name: part.of(torch.empty(manifest.tensors[f"model.{part.ours}"].shape))
            for part in wanted
        }
    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in shapes.items()}
    with bar(len(wanted)) as advance:

        def read(names: Sequence[str]) -> dict[str, Tensor]:
            tensors = {}
            # An expert's matrices are of two tensors; each of these is read once.
            for name in sorted(names, key=lambda name: by_name[name].ours):
                part = by_name[name]
                theirs = part.of(ours(part.ours)).to(dtype)
                tensors[name] = theirs.clone(memory_format=torch.contiguous_format)
                advance()
            return {name: tensors[name] for name in names}

        write_safetensors(place, sizes, read, {"format": "pt"}, shard_bytes)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(place: Path, config: Config, tokenizer: Tokenizer) -> None:
    """What `AutoTokenizer` reads: tokenizer.json and tokenizer_config.json."""
    from tokenizers import Tokenizer as Inner

    target = place / TOKENIZER_FILE
    if config.data.tokenizer == BYTES:
        target.write_text(bytes_as_json(), encoding="utf-8")
    else:
        tokenizer.save(target)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": Inner.from_file(str(target)).id_to_token(tokenizer.eos_id),
        "model_max_length": config.data.seq_len,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(place / TOKENIZER_CONFIG, described)
