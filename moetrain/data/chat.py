"""Conversations: messages become tokens, of which the assistant's answers carry the loss.

What stands around the messages says the tokenizer's chat template, a Jinja text as Hugging Face has
it; tokens are those of `apply_chat_template`, but for special tokens that messages spell out, which
stay plain text. (`strftime_now` is not there: tokens are prepared once.) An answer is what the
template adds to the conversation before it when that is asked to go on, so its own end is learned,
too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moetrain.config import DataConfig
from moetrain.data.shards import Encoded
from moetrain.data.tokenizer import Tokenizer, beside
from moetrain.errors import UserError
from moetrain.hf.names import TEMPLATE_FILE, TOKENIZER_CONFIG

VERSION = 1
"""To be raised when the same conversation becomes other tokens; part of the fingerprint."""
ASSISTANT = "assistant"
PRIVATE_USE = range(0xE000, 0xF900)
"""Characters without a meaning of their own."""

Messages = Sequence[Mapping[str, Any]]


class ContentError(ValueError):
    """What is wrong with a row, and what to do."""

    def __init__(self, problem: str, cure: str = "mend the row, or leave it out"):
        super().__init__(problem)
        self.cure = cure


def as_document(value: Any) -> str:
    """A conversation as it is kept among other documents: its messages as JSON, '' for none.

    What is null in a message counts as absent, since Parquet cannot leave it out. Raises
    `ContentError` where it is no list of messages with a role and a content, or none of them is of
    the assistant.
    """
    if not isinstance(value, list):
        raise ContentError(
            f"holds {type(value).__name__}, not a list of messages",
            "choose another column, or set data.format to text",
        )
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            found = ", ".join(message) if isinstance(message, dict) else type(message).__name__
            raise ContentError(f"needs role and content in message {number}, which has {found}")
        for part in ("role", "content"):
            if not isinstance(message[part], str):
                kind = type(message[part]).__name__
                raise ContentError(f"holds {kind}, not text, as {part} of message {number}")
    if not value:
        return ""
    if all(message["role"] != ASSISTANT for message in value):
        raise ContentError(f"holds no message of the role {ASSISTANT}, whose answers are learned")
    said = [{k: v for k, v in message.items() if v is not None} for message in value]
    try:
        text = json.dumps(said, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise ContentError("holds half a surrogate pair") from None
    except TypeError as error:
        raise ContentError(f"holds what is neither text nor number in a message: {error}") from None
    return text


class Chat:
    """A tokenizer and its chat template."""

    def __init__(
        self, template: str, tokenizer: Tokenizer, names: Mapping[str, str], subject: str
    ) -> None:
        """`names` are the special tokens that the template may speak of (`eos_token` ...), and
        `subject` says in messages where it is from.

        Raises UserError where it is no template.
        """
        self.template, self._tokenizer, self._subject = template, tokenizer, subject
        environment = _environment()
        try:
            used = meta.find_undeclared_variables(environment.parse(template))
            self._compiled = environment.from_string(template)
        except TemplateError as error:
            raise UserError(f"{subject} is no Jinja template: {error}") from error
        self._names = {name: names[name] for name in sorted(used & names.keys())}
        self.fingerprint = hashlib.sha256(
            json.dumps([VERSION, template, self._names]).encode()
        ).hexdigest()
        """Changes exactly when a conversation may be written otherwise."""
        own = tokenizer.eos_id
        self.end_ids = {own, tokenizer.special.get(names.get("eos_token", ""), own)}
        """What may end an answer."""

    def prompt(self, text: str) -> np.ndarray:
        """The ids of a user's message, up to where the answer begins: int64."""
        messages, mark = self._guarded([{"role": "user", "content": text}])
        return self._tokens(self._render(messages, goes_on=True), mark)[0]

    def encode(self, document: str) -> Encoded:
        """A conversation, as `as_document` writes it, in tokens.

        Raises UserError where the template refuses it, or writes a message otherwise once others
        follow.
        """
        messages, mark = self._guarded(json.loads(document))
        whole = self._render(messages)
        ids, starts = self._tokens(whole, mark)
        in_loss, num_bytes = np.zeros(len(ids), dtype=bool), 0
        for begin, end in self._answers(messages, whole):
            answer = whole[begin:end].replace(mark, "")
            first = begin - whole.count(mark, 0, begin)
            in_loss |= (starts >= first) & (starts < first + len(answer))
            num_bytes += len(answer.encode())
        if len(ids) and ids[-1] == self._tokenizer.eos_id:
            return Encoded(ids[:-1], num_bytes, in_loss)
        return Encoded(ids, num_bytes, np.append(in_loss, in_loss[-1:]))

    def _answers(self, messages: Messages, whole: str) -> Iterator[tuple[int, int]]:
        """Where each answer begins and ends in the whole text."""
        for number, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                before = self._render(messages[:number], goes_on=True, of=messages)
                through = self._render(messages[: number + 1])
                if not (through.startswith(before) and whole.startswith(through)):
                    raise UserError(
                        f"{self._subject} writes message {number} of {_beginning(messages)} "
                        "otherwise once others follow, so it is not known which tokens are its "
                        "answer; name another with data.chat_template"
                    )
                yield len(before), len(through)

    def _render(self, messages: Messages, goes_on: bool = False, of: Messages = ()) -> str:
        """The text of messages, which are the first `of` a conversation, or all of it."""
        given = {"tools": None, "documents": None, **self._names}
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=goes_on, **given)
        except Exception as error:  # a template may raise anything
            told = _beginning(of or messages)
            raise UserError(f"{self._subject} cannot write {told}: {error}") from error

    def _guarded(self, messages: Messages) -> tuple[Messages, str]:
        """Messages that spell no special token, since a mark lies inside each (but those of one
        character, which have no inside); and the mark."""
        used = {*json.dumps(messages, ensure_ascii=False), *self.template}
        mark = next(character for character in map(chr, PRIVATE_USE) if character not in used)

        def guard(value: Any) -> Any:
            if isinstance(value, str):
                for name in self._tokenizer.special:
                    value = value.replace(name, f"{name[0]}{mark}{name[1:]}")
                return value
            if isinstance(value, list):
                return [guard(item) for item in value]
            if isinstance(value, dict):
                return {key: guard(item) for key, item in value.items()}
            return value

        return guard(messages), mark

    def _tokens(self, text: str, mark: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text, and where they begin in it, without its marks."""
        ids, starts, place = [], [], 0
        for piece in text.split(mark):
            ids_of_piece, starts_of_piece = self._tokenizer.encode_special(piece)
            ids.append(ids_of_piece)
            starts.append(place + starts_of_piece)
            place += len(piece)
        return np.concatenate(ids), np.concatenate(starts)


def load_chat(data: DataConfig, tokenizer: Tokenizer) -> Chat:
    """`data.chat_template`, or else the template that lies beside `data.tokenizer`.

    Raises UserError where there is none, or it cannot be read.
    """
    described = _described(data.tokenizer)
    tokens = {name: _spelling(token) for name, token in described.items() if name[-6:] == "_token"}
    by_id = {index: name for name, index in tokenizer.special.items()}
    known = {name: token for name, token in tokens.items() if token is not None}
    names = {"bos_token": "", "eos_token": by_id.get(tokenizer.eos_id, ""), **known}
    if data.chat_template is not None:
        subject = f"data.chat_template ({data.chat_template})"
        return Chat(_read(data.chat_template.expanduser(), subject), tokenizer, names, subject)
    subject = f"the chat template of data.tokenizer ({data.tokenizer})"
    if file := beside(data.tokenizer, TEMPLATE_FILE):
        return Chat(_read(file, subject), tokenizer, names, subject)
    template = described.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {one["name"]: one["template"] for one in template}.get("default")
    if not isinstance(template, str):
        raise UserError(
            f"data.tokenizer ({data.tokenizer}) has no chat template; name a file with "
            "data.chat_template (configs/chat.jinja is a plain one), or put it beside, into the "
            f"folder of the model or run, as {TEMPLATE_FILE}"
        )
    return Chat(template, tokenizer, names, subject)


def _described(tokenizer: str) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer, if there is one."""
    if (file := beside(tokenizer, TOKENIZER_CONFIG)) is None:
        return {}
    subject = f"data.tokenizer ({tokenizer}): {TOKENIZER_CONFIG}"
    try:
        found = json.loads(_read(file, subject))
    except ValueError as error:
        raise UserError(f"{subject} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _spelling(token: Any) -> str | None:
    """Of a special token, which may be given with its properties; None where it is no text."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _read(path: Path, subject: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{subject} cannot be read: {error}") from error


def _beginning(messages: Messages) -> str:
    """Words for a conversation."""
    text = str(messages[0]["content"]) if messages else ""
    return f"the conversation that begins '{text[:60]}'"


# ---- Jinja, as chat templates expect it ----------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}`, by which some templates mark answers: what it holds stands as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    found.filters["tojson"] = _to_json
    found.globals["raise_exception"] = _refuse
    return found


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
