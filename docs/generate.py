"""Write docs/configuration.md from the sections of `moetrain.config`: python docs/generate.py"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from typing_extensions import TypeIs

from moetrain.config import Config, Section
from moetrain.constraints import spell

PAGE = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Settings

Every setting, its default and the values it takes. In YAML a setting stands below its section
(`moe:`, then `experts: 16`); as a flag it is `--moe.experts 16`, which lies over the file
([running](running.md#settings)). An unknown key, a value out of range and settings that contradict
each other are refused before anything starts.

This page is written by `python docs/generate.py` from `moetrain/config.py`.
"""

_NAMES = {int: "integer", float: "number", bool: "`true`, `false`", str: "text", Path: "path"}
_SIGNS = {Gt: "> {0.gt}", Ge: "≥ {0.ge}", Lt: "< {0.lt}", Le: "≤ {0.le}"}


def page() -> str:
    """The text of docs/configuration.md."""
    sections = [_section("The run", "", Config)]
    for name, field in Config.model_fields.items():
        if (annotation := field.annotation) and _is_section(annotation):
            sections.append(_section(f"`{name}`", f"{name}.", annotation))
    return "\n".join([INTRODUCTION, *sections])


def _section(title: str, prefix: str, section: type[Section]) -> str:
    about = "" if section is Config else f"{section.__doc__}\n\n"
    return f"## {title}\n\n{about}" + "\n".join(_table(prefix, section)) + "\n"


def _table(prefix: str, section: type[Section]) -> Iterator[str]:
    yield "| setting | default | values | meaning |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        if not _is_section(field.annotation):
            meaning = " ".join((field.description or "").split())
            default = spell(field.default)
            yield f"| `{prefix}{name}` | `{default}` | {_values(field)} | {meaning} |"


def _is_section(annotation: Any) -> TypeIs[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _values(field: FieldInfo) -> str:
    """What a field accepts, in words; pydantic keeps the bounds of a plain type on the field."""
    return _bounded(_kind(field.annotation), field.metadata)


def _kind(annotation: Any) -> str:
    if annotation is types.NoneType:
        return "`null`"
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return ", ".join(_kind(choice) for choice in get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        (bounds,) = annotation.__metadata__
        return _bounded(_kind(annotation.__origin__), bounds.metadata)
    return _NAMES[annotation]


def _bounded(kind: str, bounds: list[Any]) -> str:
    signs = [_SIGNS[type(b)].format(b) for b in bounds if type(b) in _SIGNS]
    return " ".join([kind, " and ".join(signs)]).strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
