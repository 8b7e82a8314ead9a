"""From a config and lists of values to variants: every combination that can run, and why the others
cannot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from moetrain import engines, settings
from moetrain.config import Config
from moetrain.constraints import check_world, spell
from moetrain.errors import UserError

AXES = ("router", "top_k", "experts", "drop_policy", "group", "capacity_factor")
"""What a sweep varies: fields of the section `moe`."""
SHAPES = ("router", "top_k", "experts")
"""Those that make another model of it."""
WORDS = {"top_k": "K ", "experts": "E ", "group": "group "}


@dataclass(frozen=True)
class Variant:
    """One setting of the layers, and all else as in the config."""

    label: str
    config: Config

    @property
    def shape(self) -> tuple[Any, ...]:
        """Variants of one shape are settings of the same model and train from one start."""
        return tuple(getattr(self.config.moe, field) for field in SHAPES)


class Refused(NamedTuple):
    """A combination that cannot run."""

    label: str
    reason: str


class Length(NamedTuple):
    """How long variants train."""

    warm_start: int
    """Optimizer steps before them, at the config's own capacity factor, drop policy and group."""
    steps: int
    """Optimizer steps of each variant."""

    @property
    def total(self) -> int:
        """Steps of the learning-rate schedule."""
        return self.warm_start + self.steps


def variants(
    base: Config, values: Mapping[str, Sequence[Any]], total_steps: int, world: int
) -> tuple[list[Variant], list[Refused]]:
    """Every combination of `values` (by field, the config's own where a field is missing).

    A dropless variant is there once: no drop policy makes a difference to it.
    """
    if not base.moe.experts:
        raise UserError("moe.experts (0) leaves no capacity to choose; try 8")
    axes = {field: list(values.get(field) or [getattr(base.moe, field)]) for field in AXES}
    told = [field for field in AXES if len(axes[field]) > 1 and field != "capacity_factor"]
    able: list[Variant] = []
    refused: list[Refused] = []
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        is_dropless = chosen["capacity_factor"] is None
        if is_dropless and chosen["drop_policy"] != axes["drop_policy"][0]:
            continue
        named = [field for field in told if not (is_dropless and field == "drop_policy")]
        label = ", ".join([*(_word(field, chosen[field]) for field in named), _factor(chosen)])
        if label in {variant.label for variant in able}:
            continue  # a value that was given twice
        try:
            able.append(Variant(label, _config(base, chosen, total_steps, world)))
        except UserError as error:
            refused.append(Refused(label, str(error)))
    if not able:
        raise UserError("\n".join(dict.fromkeys(f"{one.label}: {one.reason}" for one in refused)))
    return able, refused


def own(found: Sequence[Variant], base: Config) -> Variant:
    """The variant that others are compared with: the config's own setting, else the first."""
    same = (v for v in found if all(getattr(v.config.moe, f) == getattr(base.moe, f) for f in AXES))
    return next(same, found[0])


def with_moe(config: Config, **fields: Any) -> Config:
    """The config with other fields in its section `moe`, checked anew."""
    return _replaced(config, {"moe": fields})


def _config(base: Config, chosen: dict[str, Any], total_steps: int, world: int) -> Config:
    config = _replaced(
        base,
        {
            "moe": chosen,
            "train": {"steps": total_steps},
            "checkpoint": {"every": 0, "resume": "never"},
            "log": {"wandb": "off", "trace": False},
        },
    )
    check_world(config, world, settings.ranks_of_node())
    engines.check(config, world)
    return config


def _replaced(config: Config, given: Mapping[str, Mapping[str, Any]]) -> Config:
    values = config.model_dump()
    for section, fields in given.items():
        values[section] |= fields
    return settings.resolve(None, values)


def _word(field: str, value: Any) -> str:
    return f"{WORDS.get(field, '')}{spell(value)}"


def _factor(chosen: dict[str, Any]) -> str:
    factor = chosen["capacity_factor"]
    return "dropless" if factor is None else spell(factor)
