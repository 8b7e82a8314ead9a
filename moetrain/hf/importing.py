"""What `moetrain import` does: write a model of Hugging Face as a checkpoint to go on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from moetrain.hf.formats import format_of, sections_of
from moetrain.hf.names import CONFIG, KEPT, SOURCE
from moetrain.hf.tensors import Part, parts, require_none
from moetrain.model import Transformer
from moetrain.restore import TOKENIZER_FILE
from moetrain.resume import described
from moetrain.step import Position

PLAIN = ("F32", "BF16", "F16")
"""Types that tensors may come in, by safetensors' names."""


class Opened(NamedTuple):
    """A model of Hugging Face, its tensors still on disk."""

    config: Config
    """Its settings as ours; the tokenizer is `data.tokenizer` as it is given."""
    tokenizer: Tokenizer
    beside: Mapping[str, Path]
    """Files that stand beside its tensors, by the names they have with us."""
    make: Callable[[str], Tensor]
    """Makes one of our parameters or buffers, in fp32, by its name in the model."""


def import_model(source: str, out: Path, tokenizer: str | None = None) -> None:
    """Write a model of Hugging Face to the folder `out`, which must not exist, as that of a run.

    `source` is a folder, or the name of a model on the hub. The folder then has config.yaml, the
    tokenizer, and a checkpoint of step 0 whose weights are in fp32; `moetrain generate`, `eval` and
    `export` read it, and `init_from` trains on from it. Two parameters at a time are in memory.
    `tokenizer` (as data.tokenizer) replaces that of the source.

    Raises UserError where the format is not known or does what cannot be done here, where tensors
    are missing, left over or of another shape, and where `out` is in the way or cannot be written;
    it is then not there.
    """
    with opened(source, tokenizer) as theirs:
        write(out, theirs.config, theirs)


@contextmanager
def opened(source: str, tokenizer: str | None) -> Iterator[Opened]:
    """A model of Hugging Face, to be read while this lasts. Raises as `import_model`."""
    folder = _folder_of(source)
    theirs = _read_json(folder / CONFIG)
    name = format_of(theirs, str(folder / CONFIG))
    loaded = load_tokenizer(tokenizer or str(_tokenizer_of(folder)))
    config = settings.resolve(None, sections_of(name, theirs))
    model = build_model(config, loaded.vocab_size)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    wanted = list(parts(name, config))
    of_ours: dict[str, list[Part]] = {}
    for part in wanted:
        of_ours.setdefault(part.ours, []).append(part)
    originals = {file: folder / (CONFIG if file == SOURCE else file) for file in KEPT}
    beside = {file: path for file, path in originals.items() if path.is_file() and not tokenizer}
    with _tensors(folder) as there:
        _require_alike(wanted, model, there, config.model.tie_embeddings)

        def make(name: str) -> Tensor:
            whole = torch.empty(shapes[name])
            for part in of_ours[name]:
                part.of(whole).copy_(there.read(part.name))
            return whole

        yield Opened(config, loaded, beside, make)


def write(out: Path, config: Config, model: Opened) -> None:
    """Write a checkpoint of step 0 as a run's folder; `model` makes the parameters of `config`."""
    loaded = model.tokenizer
    name = BYTES if loaded.fingerprint == BYTES else str(out / TOKENIZER_FILE)
    data = config.data.model_copy(update={"tokenizer": name})
    config = config.model_copy(update={"data": data})
    empty = build_model(config, loaded.vocab_size)
    if config.engine.precision == "fp64":
        empty.double()
    named = [*empty.named_parameters(), *empty.named_buffers()]
    tensors = {f"model.{name}": tensor.detach() for name, tensor in named}
    extra = described(config, Position(), loaded.vocab_size, loaded.fingerprint, text=None)
    with bar(len(tensors)) as advance, written_beside(out) as place, one_process():

        def make(name: str) -> Tensor:
            advance()
            return model.make(name.removeprefix("model."))

        place.mkdir()
        checkpoint.save(place, 0, tensors, extra, make=make)
        loaded.save(place / TOKENIZER_FILE)
        settings.save(config, place / "config.yaml")
        for file, path in model.beside.items():
            shutil.copyfile(path, place / file)


# ---- files ---------------------------------------------------------------------------------------


def _folder_of(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not may_be_on_hub(source):
        raise UserError(f"{source} is no folder; name one, or a model on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja"]
    found = fetch(
        lambda: snapshot_download(source, allow_patterns=wanted),
        f"'{source}'",
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
def _tensors(folder: Path) -> Iterator[_There]:
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
