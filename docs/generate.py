"""Write the pages of docs/ that repeat what the code declares: python docs/generate.py"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from typing_extensions import TypeIs

from moetrain import metrics
from moetrain.commands import base, checkpoints, data, models, runs
from moetrain.config import Config, DataConfig, Section
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

COMMANDS = """\
# Commands

What `moetrain` can do; `python -m moetrain` is the same. `moetrain --help`, and `--help` after any
command, tell it on the terminal. What has no default must be given. Settings of a run are flags of
the commands that read them, by the names of [the configuration](configuration.md). What the exit
code says: [running](running.md#exit-codes).

This page is written by `python docs/generate.py` from `moetrain/commands`.
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
_FLAGS = {  # as the arguments of a command that take settings
    base.Flags: "[--section.field VALUE ...]",
    base.CorpusFlags: "[--data.NAME VALUE ...]",
    base.TextFlags: "[--data.NAME VALUE ...]",
}
_OF_DATA = {base.CorpusFlags: base.READING, base.TextFlags: base.SCORING}
_NAMES = {int: "integer", float: "number", bool: "`true`, `false`", str: "text", Path: "path"}
_SIGNS = {Gt: "> {0.gt}", Ge: "≥ {0.ge}", Lt: "< {0.lt}", Le: "≤ {0.le}"}


def pages() -> dict[str, str]:
    """The text of each page by its file's name."""
    return {
        "commands.md": _commands_page(),
        "configuration.md": _settings_page(),
        "metrics.md": _metrics_page(),
    }


def _commands_page() -> str:
    sections = [COMMANDS]
    for module in (runs, models, checkpoints, data):
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.ClassDef) and (name := _command_name(node)):
                sections.append(_command(name, node, getattr(module, node.name)))
    return "\n".join(sections)


def _command_name(node: ast.ClassDef) -> str:
    """`checkpoint list` of a class that @checkpoint_app.command(name="list") decorates."""
    for decorator in node.decorator_list:
        if found := re.fullmatch(r"(?:(\w+)_)?app\.command\(name='(.+)'\)", ast.unparse(decorator)):
            return " ".join(filter(None, found.groups()))
    return ""


def _command(name: str, node: ast.ClassDef, command: type) -> str:
    """How a command is called, what it does, and what each of its arguments is."""
    hints = get_type_hints(command, include_extras=True)
    meanings = dict(_documented(node))
    places, needed, settings, rows, last = [], [], [], [], []
    for field in dataclasses.fields(command):
        kind, is_needed = hints[field.name], field.default is dataclasses.MISSING
        if kind in _FLAGS:
            settings.append(_FLAGS[kind])
            taken = {name: DataConfig.model_fields[name] for name in _OF_DATA.get(kind, ())}
            last += [_row(f"--data.{name}", setting) for name, setting in taken.items()]
            continue
        if get_origin(kind) is Annotated:  # positional
            argument = kind.__metadata__[0].metavar
            places.append(argument)
        else:
            argument = f"--{field.name.replace('_', '-')}"
            needed += [f"{argument} ..."] * is_needed
        is_blank = is_needed or field.default == ()
        default = "" if is_blank else f"`{spell(field.default)}`"
        values = "on where it is given" if kind is bool else _kind(kind)
        rows.append(f"| `{argument}` | {default} | {values} | {meanings[field.name]} |")
    usage = " ".join([f"moetrain {name}", *places, *needed, *settings])
    about = " ".join((ast.get_docstring(node) or "").split())
    table = ["| argument | default | values | meaning |", "|---|---|---|---|", *rows, *last]
    return f"## moetrain {name}\n\n{about}\n\n```text\n{usage}\n```\n\n" + "\n".join(table) + "\n"


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
    """One row for every field of a typed dictionary."""
    meanings = dict(_documented(node))
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            name, value = ast.unparse(field.target), _NUMBERS[ast.unparse(field.annotation)]
            yield f"| `{name}` | {value} | {meanings[name]} |"


def _documented(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """The fields of a class that have a docstring below them, and that."""
    for field, after in pairwise(node.body):
        match field, after:
            case ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(text))):
                yield ast.unparse(field.target), " ".join(text.split())


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
            yield _row(f"{prefix}{name}", field)


def _row(name: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    return f"| `{name}` | `{spell(field.default)}` | {_values(field)} | {meaning} |"


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
    if get_origin(annotation) is tuple:
        return f"any number of: {_kind(get_args(annotation)[0])}"
    if hasattr(annotation, "__metadata__"):
        bounds = getattr(annotation.__metadata__[0], "metadata", [])
        return _bounded(_kind(annotation.__origin__), bounds)
    return _NAMES[annotation]


def _bounded(kind: str, bounds: list[Any]) -> str:
    signs = [_SIGNS[type(b)].format(b) for b in bounds if type(b) in _SIGNS]
    return " ".join([kind, " and ".join(signs)]).strip()


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
