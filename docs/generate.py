"""Write docs/configuration.md and docs/metrics.md from the code: python docs/generate.py"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from typing_extensions import TypeIs

from moetrain import metrics
from moetrain.config import Config, Section
from moetrain.constraints import spell

HERE = Path(__file__).parent

SETTINGS = """\
# Settings

Every setting, its default and the values it takes. In YAML a setting stands below its section
(`moe:`, then `experts: 16`); as a flag it is `--moe.experts 16`, which lies over the file
([running](running.md#settings)). An unknown key, a value out of range and settings that contradict
each other are refused before anything starts.

This page is written by `python docs/generate.py` from `moetrain/config.py`.
"""

METRICS = """\
# metrics.jsonl

A run writes one JSON object a line to `OUT/NAME/metrics.jsonl`, at once. A training line is written
every `log.every` steps and after the last; it describes that one step, not a mean since the line
before (the speed does). An evaluation writes a line of its own. NaN and infinity are `null`.

What the counts mean and where they come from: [the drop ledger](concepts.md#the-drop-ledger). The
same figures as pictures: [running](running.md#pictures); for other settings:
[record and replay](replay.md).

This page is written by `python docs/generate.py` from `moetrain/metrics.py`.
"""

_LINES = {
    "A training line": (metrics.TrainLine, metrics.Rates, metrics.Speed),
    "Each of `layers`": (metrics.LayerLine,),
    "An evaluation line": (metrics.EvalLine,),
}
_NUMBERS = {
    "int": "integer",
    "bool": "`true`, `false`",
    "float": "number",
    "float | None": "number",
    "ByRank": "a number a rank",
    "list[int]": "E integers",
    "list[float]": "K numbers",
    "list[list[int]]": "4 integers a rank",
    "list[LayerLine]": "objects",
}
_NAMES = {int: "integer", float: "number", bool: "`true`, `false`", str: "text", Path: "path"}
_SIGNS = {Gt: "> {0.gt}", Ge: "≥ {0.ge}", Lt: "< {0.lt}", Le: "≤ {0.le}"}


def pages() -> dict[str, str]:
    """The text of each page by its file's name."""
    return {"configuration.md": _settings_page(), "metrics.md": _metrics_page()}


def _metrics_page() -> str:
    tree = ast.parse(inspect.getsource(metrics))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    sections = [METRICS]
    for title, types_of_line in _LINES.items():
        nodes = [classes[line_type.__name__] for line_type in types_of_line]
        about = " ".join((ast.get_docstring(nodes[0]) or "").split())
        rows = [row for node in nodes for row in _field_rows(node)]
        table = ["| field | value | meaning |", "|---|---|---|", *rows]
        sections.append(f"## {title}\n\n{about}\n\n" + "\n".join(table) + "\n")
    return "\n".join(sections)


def _field_rows(node: ast.ClassDef) -> Iterator[str]:
    """One row for every field of a typed dictionary and the docstring below it."""
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr), f"{ast.unparse(field)} has no docstring"
            meaning = " ".join(ast.literal_eval(after.value).split())
            value = _NUMBERS[ast.unparse(field.annotation)]
            yield f"| `{ast.unparse(field.target)}` | {value} | {meaning} |"


def _settings_page() -> str:
    sections = [_section("The run", "", Config)]
    for name, field in Config.model_fields.items():
        if (annotation := field.annotation) and _is_section(annotation):
            sections.append(_section(f"`{name}`", f"{name}.", annotation))
    return "\n".join([SETTINGS, *sections])


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
    if get_origin(annotation) is tuple:
        return f"any of {_kind(get_args(annotation)[0])}"
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
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
