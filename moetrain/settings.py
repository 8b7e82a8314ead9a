"""From a YAML file and command-line flags to a `Config`, and back to a file.

YAML values lie over the defaults and flags lie over the YAML; all are checked once, together, so
that a flag can mend what the file alone would get wrong. tyro types the flags, PyYAML reads the
file, pydantic checks the values; whatever they object to becomes one `UserError`.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, TypedDict, get_args, get_type_hints

import tyro
import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo
from yaml.constructor import ConstructorError
from yaml.scanner import ScannerError

from moetrain.config import Config, Section
from moetrain.constraints import spell
from moetrain.errors import UserError
from moetrain.redact import redact, require_whole


def load(path: Path | str | None, flags: Sequence[str] = ()) -> Config:
    """Read a YAML file (None: defaults alone), put typed flags over it and check the whole.

    Flags read `--section.field value` or `--section.field=value`; `null` is null.
    Raises `UserError` with one line per problem.
    """
    if not flags:
        return resolve(path, {})
    check_flag_names(flags)
    with one_message(flags):
        given = tyro.cli(flags_of(Config), prog="moetrain", args=flags, registry=REGISTRY)
    return resolve(path, given)


def resolve(path: Path | str | None, given: Mapping[str, Any]) -> Config:
    """The config of a YAML file (None: of the defaults) under `{section: {field: value}}`."""
    values = {} if path is None else read_yaml(Path(path))
    try:
        return Config.model_validate(merged(values, given))
    except ValidationError as error:
        raise UserError("\n".join(_explanations(error))) from None


def save(config: Config, path: Path) -> None:
    """Write every setting, defaults too, as YAML that `load` reads back equal, but for secrets."""
    # Escaped: written as they are, some line breaks of Unicode do not read back.
    text = yaml.safe_dump(redacted(config), sort_keys=False)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def redacted(section: Section) -> dict[str, Any]:
    """Every setting as a plain value that may be written down: free text without its secrets.

    The name stays, because folders are called by it, and so does a word out of a list.
    """
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            values[name] = redacted(value)
        elif {str, Path} & {field.annotation, *get_args(field.annotation)} and name != "name":
            values[name] = value and redact(values[name])
    return values


def run_directory(out: Path, name: str) -> Path:
    """`out/name` with every link followed; `UserError` if a link leads out of `out`."""
    require_whole("out", str(out))
    home, folder = out.resolve(), (out / name).resolve()
    if home not in folder.parents:
        raise UserError(
            f"name ({name}) leads out of out ({out}) by a link, to {folder}; "
            "remove the link or choose another name"
        )
    return folder


# ---------------------------------------------------------------- YAML


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file: plain values only, no key twice, an empty section is {}."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a YAML file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: {error.problem}{_YAML_FIX.get(type(error), '')}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not YAML in UTF-8: {error}") from None
    if not isinstance(values, dict | NoneType):
        raise UserError(f"{path} must hold sections such as 'moe:', not a {type(values).__name__}")
    return {
        key: {} if value is None and _subsection(Config, key) else value
        for key, value in (values or {}).items()
    }


_YAML_FIX: dict[type, str] = {
    ConstructorError: "; write plain values, without tags",
    ScannerError: "; put text that holds YAML's signs in quotes",
}


class _Loader(yaml.SafeLoader):
    """Safe YAML without repeated keys, in which only true and false are booleans (YAML 1.2)."""

    yaml_implicit_resolvers: ClassVar = {  # so that `wandb: off` stays the word it looks like
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"{key.value} is given twice; keep one of the two"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF")
)


def merged(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`{section: {field: value}}` under another one."""
    found = dict(values)
    for key, value in given.items():
        if isinstance(value, dict):
            section = found.get(key, {})
            found[key] = {**section, **value} if isinstance(section, dict) else section
        else:
            found[key] = value
    return found


# ---------------------------------------------------------------- flags

REGISTRY = ConstructorRegistry()
"""How flags spell null and booleans: as YAML does."""


@REGISTRY.primitive_rule
def _null_flag(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if info.type is not NoneType:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="null",
        choices=("null", "None"),
        instance_from_str=lambda words: None,
        is_instance=lambda value: value is None,
        str_from_instance=lambda value: [spell(value)],
    )


@REGISTRY.primitive_rule
def _bool_flag(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if info.type is not bool:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        choices=("true", "false", "True", "False"),
        instance_from_str=lambda words: words[0].lower() == "true",
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [spell(value)],
    )


def flags_of(section: type[Section], only: Collection[str] | None = None) -> Any:
    """A type for tyro: every field of a section, or `only` some, as a flag that may be missing.

    What was not given is missing from the parsed dict as well, so a flag's default cannot hide the
    value of the file. Help comes from the fields' descriptions.
    """
    hints = get_type_hints(section)  # without pydantic's constraints: pydantic checks them later
    flags = {}
    for name, field in section.model_fields.items():
        if subsection := _subsection(section, name):
            flags[name] = flags_of(subsection)
        elif only is None or name in only:
            hint = tyro.conf.arg(
                help=field.description, help_behavior_hint=f"(default: {spell(field.default)})"
            )
            flags[name] = Annotated[hints[name], tyro.conf.FlagConversionOff, hint]
    typed = TypedDict(section.__name__, flags, total=False)  # pyright: ignore
    typed.__doc__ = section.__doc__
    return typed


def check_flag_names(args: Sequence[str]) -> None:
    """Raise `UserError` if a flag is given twice (tyro would silently take the last), or names no
    setting (tyro would take it for a positional argument where one is still missing).
    """
    names = [arg.split("=")[0][2:].replace("-", "_") for arg in args if arg.startswith("--")]
    problems = [
        f"--{name.replace('_', '-')} is given twice; keep one"
        for name, times in Counter(names).items()
        if times > 1
    ]
    known = set(_dotted(Config))
    for name in names:
        if "." in name and name not in known:
            problems.append(f"{name} is not a setting; {_suggestion(name)}")
    if problems:
        raise UserError("\n".join(problems))


@contextlib.contextmanager
def one_message(args: Sequence[str]) -> Iterator[None]:
    """Turn tyro's boxed complaint of `args` and its exit into one `UserError`."""
    screen = io.StringIO()
    try:
        with contextlib.redirect_stderr(screen):
            yield
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise UserError(_unboxed(_redacted(screen.getvalue(), args))) from None


def _redacted(text: str, args: Sequence[str]) -> str:
    """The text without the secrets of `args`, which tyro may have broken over lines."""
    for value in {part for arg in args for part in (arg, arg.partition("=")[2])}:
        if (shown := redact(value)) != value:
            broken = r"[\s│]*".join(map(re.escape, value))
            text = re.sub(broken, lambda _, shown=shown: shown, text)
    return text


def _unboxed(text: str) -> str:
    """The content of tyro's box, drawn with lines or, on a plain terminal, with hyphens.

    Left out: the title, the advice to ask for help, and which commands have a proposed flag.
    """
    lines = [line.strip("│ ") for line in text.splitlines()[1:]]
    blocks = "\n".join("" if set(line) <= set("╰─╯-") else line for line in lines).split("\n\n")
    kept = [block.strip() for block in blocks if not block.strip().startswith("For full helptext")]
    lines = [line for line in "\n".join(kept).split("\n") if line and not _FOUND_IN.fullmatch(line)]
    message = "\n".join(dict.fromkeys(lines))  # what two commands have is proposed once
    return _MISPLACED.sub(r"an unknown flag stands before \1; put \1 first", message)


_FOUND_IN = re.compile(r"in moetrain .*--help")
_MISPLACED = re.compile(r"Missing value for argument '(\w+)'.*", re.DOTALL)


# ---------------------------------------------------------------- messages


def _explanations(error: ValidationError) -> Iterator[str]:
    """One line per wrong field; the branches of a union are one line."""
    by_field: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        depth = 2 if detail["loc"] and _subsection(Config, detail["loc"][0]) else 1
        by_field.setdefault(".".join(map(str, detail["loc"][:depth])), []).append(detail)
    for field, details in by_field.items():
        yield _explanation(field, details)


_PLAIN_WORDS = {
    "tuple_type": "a list, such as [a, b]",
    "string_type": "text (put it in quotes)",
    "path_type": "a path",
}


def _explanation(field: str, details: list[ErrorDetails]) -> str:
    first = details[0]
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")  # from moetrain.constraints: complete
    if first["type"] in ("extra_forbidden", "invalid_key"):
        return f"{field} is not a setting; {_suggestion(field)}"
    *above, name = field.split(".")
    owner = _subsection(Config, above[0]) if above else Config
    if owner is None or name not in owner.model_fields or _subsection(owner, name):
        return f"{field} ({_short(first['input'])}) must be a section with settings of its own"
    wanted = [_PLAIN_WORDS.get(detail["type"], detail["msg"]) for detail in details]
    wanted = [words.removeprefix("Input should be ").split(", unable")[0] for words in wanted]
    if NoneType in get_args(owner.model_fields[name].annotation):
        wanted.append("null")
    default = spell(owner.model_fields[name].default)
    return (
        f"{field} ({_short(first['input'])}) must be {' or '.join(wanted)}; "
        f"the default is {default}"
    )


def _suggestion(field: str) -> str:
    known = list(_dotted(Config))
    above, _, leaf = field.rpartition(".")
    if field in known:
        return f"write {above}: and, indented below it, {leaf}:"
    leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    near = difflib.get_close_matches(field, known, n=1, cutoff=0.75)
    if not near:
        near = [leaves[name] for name in difflib.get_close_matches(leaf, leaves, 1, cutoff=0.75)]
    if near:
        return f"did you mean {near[0]}?"
    owner = _subsection(Config, above)
    return f"{above if owner else 'the top level'} has {', '.join((owner or Config).model_fields)}"


def _dotted(section: type[Section], above: str = "") -> Iterator[str]:
    for name in section.model_fields:
        yield above + name
        if subsection := _subsection(section, name):
            yield from _dotted(subsection, f"{above}{name}.")


def _subsection(section: type[Section], name: object) -> type[Section] | None:
    field = section.model_fields.get(name) if isinstance(name, str) else None
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _short(value: object) -> str:
    text = spell(value)
    return text if len(text) <= 60 else text[:57] + "..."


def ranks_of_node() -> int | None:
    """The number of ranks on this node, where the launcher says it."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # torchrun's, and that of DeepSpeed's launcher
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), None)
