"""The settings of a run that starts from the weights of another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain import settings
from moetrain.config import Config
from moetrain.errors import UserError


def resolve_run(path: Path | str | None, given: Mapping[str, Any]) -> Config:
    """The config of a run's YAML file under flags; below both lies what `init_from` brings along.

    That is the model of the checkpoint that `init_from` comes to; or of the run itself, once it has
    saved: to go on it does not need where it came from. Raises `UserError` as `resolve` does, and
    where there is no checkpoint to start from.
    """
    values = settings.merged({} if path is None else settings.read_yaml(Path(path)), given)
    if not isinstance(start := values.get("init_from"), str | Path):
        return settings.resolve(None, values)
    from moetrain import checkpoint, restore  # of torch; other commands do without

    own = settings.resolve(None, {key: values[key] for key in ("name", "out") if key in values})
    saved = checkpoint.latest(own.out / own.name)
    try:
        found = restore.find(saved or start)
    except UserError as error:
        raise UserError(f"init_from ({start}): {error}") from None
    shape = {name: getattr(found.config, name).model_dump() for name in ("model", "moe")}
    values = settings.merged({**shape, "data": {"tokenizer": found.config.data.tokenizer}}, values)
    return settings.resolve(None, values if saved else {**values, "init_from": found.path})
