"""What `moetrain import` does: write a model of Hugging Face as a checkpoint to go on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetrain import checkpoint, settings
from moetrain.build import build_model
from moetrain.config import Config
from moetrain.convert import INDEX, WEIGHTS, one_process, written_beside
from moetrain.data import BYTES, Tokenizer, load_tokenizer
from moetrain.data.hub import fetch, may_be_on_hub
from moetrain.errors import UserError
from moetrain.hf.bar import bar
from moetrain.hf.formats import Part, format_of, parts, require_none, sections_of
from moetrain.hf.names import CONFIG, KEPT, SOURCE
from moetrain.model import Transformer
from moetrain.restore import TOKENIZER_FILE
from moetrain.resume import described
from moetrain.step import Position

PLAIN = ("F32", "BF16", "F16")
"""Types that tensors may come in, by safetensors' names."""


def import_model(source: str, out: Path, tokenizer: str | None = None) -> None:
    """Write a model of Hugging Face to the folder `out`, which must not exist, as that of a run.

    `source` is a folder, or the name of a model on the hub. The folder then has config.yaml, the
    tokenizer, and a checkpoint of step 0 whose weights are in fp32; `moetrain generate`, `eval` and
    `export` read it, and `init_from` trains on from it. One tensor at a time is in memory (of all
    experts of a layer, for theirs). `tokenizer` (as data.tokenizer) replaces that of the source.

    Raises UserError where the format is not known or does what cannot be done here, where tensors
    are missing, left over or of another shape, and where `out` is in the way or cannot be written;
    it is then not there.
    """
    folder = _folder_of(source)
    theirs = _read_json(folder / CONFIG)
    name = format_of(theirs, str(folder / CONFIG))
    loaded = load_tokenizer(tokenizer or str(_tokenizer_of(folder)))
    sections = sections_of(name, theirs)
    sections["data"]["tokenizer"] = tokenizer if tokenizer == BYTES else str(out / TOKENIZER_FILE)
    config = settings.resolve(None, sections)
    model = build_model(config, loaded.vocab_size)
    wanted = list(parts(name, config))
    with _opened(folder) as there:
        _require_alike(wanted, model, there, is_tied=config.model.tie_embeddings)
        with written_beside(out) as place, one_process():
            place.mkdir()
            _write_weights(place, config, model, wanted, there, loaded)
            loaded.save(place / TOKENIZER_FILE)
            settings.save(config, place / "config.yaml")
            for file in KEPT if tokenizer is None else ():
                if (original := folder / (CONFIG if file == SOURCE else file)).is_file():
                    shutil.copyfile(original, place / file)


def _folder_of(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not may_be_on_hub(source):
        raise UserError(f"SOURCE ({source}) is no folder; name one, or a model on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja"]
    found = fetch(
        lambda: snapshot_download(source, allow_patterns=wanted),
        f"SOURCE ('{source}')",
        "is neither a folder here nor a model on the hub",
        (RepositoryNotFoundError,),
    )
    return Path(found)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold an object, not a {type(content).__name__}")
    return content


def _tokenizer_of(folder: Path) -> Path:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {TOKENIZER_FILE}; name a tokenizer with --tokenizer")
    return path


# ---- tensors -------------------------------------------------------------------------------------


class _There(NamedTuple):
    """The tensors of a source, on disk until they are read."""

    files: Mapping[str, Any]
    """By tensor, the open file that holds it."""

    def shape(self, name: str) -> list[int]:
        return self.files[name].get_slice(name).get_shape()

    def dtype(self, name: str) -> str:
        return self.files[name].get_slice(name).get_dtype()

    def read(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)


@contextmanager
def _opened(folder: Path) -> Iterator[_There]:
    """Every safetensors file that belongs to the model."""
    from safetensors import SafetensorError, safe_open

    if (folder / INDEX).is_file():
        places = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise UserError(f"{folder / INDEX} has no weight_map; download it again")
        names = sorted(set(places.values()))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        raise UserError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; other kinds of files are not read: save "
            "the model as safetensors first"
        )
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for name in names:
            try:
                file = stack.enter_context(safe_open(folder / name, "pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder / name} cannot be read: {error}") from error
            files |= dict.fromkeys(file.keys(), file)
        yield _There(files)


def _require_alike(
    wanted: Sequence[Part], model: Transformer, there: _There, is_tied: bool
) -> None:
    """UserError with the list of tensors that are missing, left over or of another kind."""
    ours = dict(model.named_parameters())
    needed = {part.name: list(part.of(ours[part.ours]).shape) for part in wanted}
    known = {name for name in there.files if not _says_nothing(name, is_tied)}
    both = needed.keys() & known
    require_none(
        {
            "missing": needed.keys() - known,
            "without a place in the model": known - needed.keys(),
            "of another shape than config.json says": (
                f"{name} {there.shape(name)} instead of {needed[name]}"
                for name in both
                if there.shape(name) != needed[name]
            ),
            f"of another type than {', '.join(PLAIN)}": (
                f"{name} ({there.dtype(name)})" for name in both if there.dtype(name) not in PLAIN
            ),
        }
    )


def _says_nothing(name: str, is_tied: bool) -> bool:
    """Whether a tensor follows from others: frequencies that old checkpoints hold, a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (is_tied and name == "lm_head.weight")


def _write_weights(
    place: Path,
    config: Config,
    model: Transformer,
    wanted: Sequence[Part],
    there: _There,
    tokenizer: Tokenizer,
) -> None:
    tensors = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    of_ours: dict[str, list[Part]] = {}
    for part in wanted:
        of_ours.setdefault(f"model.{part.ours}", []).append(part)
    extra = described(config, Position(), tokenizer.vocab_size, tokenizer.fingerprint, text=None)
    with bar(len(wanted)) as advance:

        def make(name: str) -> Tensor:
            whole = torch.empty(tensors[name].shape)
            for part in of_ours[name]:
                part.of(whole).copy_(there.read(part.name))
                advance()
            return whole

        checkpoint.save(place, 0, tensors, extra, make=make)
