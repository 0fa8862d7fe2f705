"""Chat templates: Jinja, rendered as transformers renders them, and which characters each assistant turn wrote.

Texts of messages that spell a control token are disguised while the template runs, so that in the result the template's
control tokens can be told from the text's. The sandbox and its settings are those of transformers'
`apply_chat_template`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from base.errors import DataError
from cherry.data.chat import ROLES, Chat, messages_for_template, trained_turns
from cherry.data.control_tokens import ControlTokens

FILE_NAME = "chat_template.jinja"
_MARKS = "generation_marks_of_this_rendering"
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Keys of a record beside `messages` that change what the model is to see.
_RECORD_KEYS = ("tools", "documents", "functions", "tool_choice", "chat_template_kwargs", "system", "images", "videos")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    `disguised` has the same length and differs from `text` only where a message's text spells a control token.
    `spans` are the characters that bear loss, as (start, end): an assistant turn after the generation prompt.
    """

    text: str
    disguised: str
    spans: list[tuple[int, int]]


class ChatTemplate:
    """A Jinja chat template.

    Args:
        source: the template.
        origin: where it comes from, for people.
        special_tokens: `bos_token` and `eos_token` of the template.

    Raises:
        DataError: it is not a template.
    """

    def __init__(self, source: str, origin: str, special_tokens: Mapping[str, str | None]) -> None:
        self.source = source
        self.origin = origin
        self._special_tokens = special_tokens
        environment = _environment()
        try:
            self._compiled = environment.from_string(source)
            self._tree = environment.parse(source)
        except jinja2.TemplateError as error:
            raise DataError(f"{origin}: not a chat template that Jinja reads: {error}. Correct or copy it.") from error

    @cached_property
    def reads(self) -> set[str]:
        """Names of attributes and keys, and other literal strings: every key of a message that it reads is in it."""
        constants = {node.value for node in self._tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return constants | {node.attr for node in self._tree.find_all(nodes.Getattr)}

    @cached_property
    def variables(self) -> set[str]:
        """Names of the variables that it takes."""
        return jinja2.meta.find_undeclared_variables(self._tree)

    @cached_property
    def _looked_for(self) -> set[str]:
        """Literal strings that it looks for in texts: what it compares with, and arguments of methods and filters."""
        places = [*self._tree.find_all(nodes.Call), *self._tree.find_all(nodes.Compare)]
        places += self._tree.find_all(nodes.Filter)
        direct = [child for place in places for child in place.iter_child_nodes()]
        direct += [child.expr for child in direct if isinstance(child, nodes.Operand)]
        return {node.value.strip() for node in direct if isinstance(node, nodes.Const) and isinstance(node.value, str)}

    def render(self, chat: Chat, where: str, control: ControlTokens) -> Rendered:
        """The conversation as the template writes it.

        Args:
            where: the record, for errors.
            control: tokens that no text of the conversation may become.

        Raises:
            DataError: the template does not read a key that is given, refuses the conversation, or renders an earlier
                turn otherwise than at its end.
        """
        self._check_keys(chat, where)
        messages = messages_for_template(chat)
        text, marked = self._render(messages, chat.context, where)
        disguised = self._disguised(chat, messages, text, where, control)
        self._check_joins(messages, chat.context, disguised, where, control)
        self._check_roles(messages, chat.context, text, where)
        trained = trained_turns(chat)
        if marked is not None:
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            if len(marked) != len(turns) and not all(trained[i] for i in turns):
                raise DataError(
                    f"{where}: the template marks {len(marked)} of {len(turns)} turns, so a weight of 0 has no place."
                )
            return Rendered(text, disguised, [s for i, s in zip(turns, marked, strict=False) if trained[i]])
        spans = [self._span(messages, i, chat.context, text, where) for i, bears in enumerate(trained) if bears]
        return Rendered(text, disguised, spans)

    def _check_keys(self, chat: Chat, where: str) -> None:
        for number, message in enumerate(chat.messages, start=1):
            for key, value in message.items():
                known = {"role", "content", "weight", "train", "training"} | self.reads
                if key in _REASONING and self.reads & {"reasoning_content", "thinking", key}:
                    continue
                if key not in known and value not in (None, "", [], {}):
                    raise DataError(
                        f"{where}: message {number} has the key {key!r}, which the chat template ({self.origin}) does "
                        f"not read: the model would not see it. Remove the key, or give a template that reads it "
                        "(data.chat_template)."
                    )
        for key in chat.context:
            if key in _RECORD_KEYS and key not in self.variables and chat.context[key]:
                raise DataError(
                    f"{where}: the record has the key {key!r}, which the chat template ({self.origin}) does not read. "
                    "Remove the key, or give a template that reads it (data.chat_template)."
                )

    def _check_roles(self, messages: list[dict[str, Any]], context: Mapping[str, Any], text: str, where: str) -> None:
        """A role that the template does not name must leave a trace in the text all the same."""
        for i, message in enumerate(messages):
            role = message["role"]
            if role not in ROLES and role not in self.reads:
                rest = messages[:i] + messages[i + 1 :]
                if self._render(rest, context, where)[0] == text:
                    raise DataError(
                        f"{where}: the chat template ({self.origin}) leaves out messages of the role {role!r}. Remove "
                        "the message, or give a template that renders it (data.chat_template)."
                    )

    def _render(
        self, messages: Sequence[Any], context: Mapping[str, Any], where: str, *, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """Text, and the spans of its `generation` blocks; `None` where the template has none."""
        own = {key: value for key, value in context.items() if key in self.variables}
        marks = _unused(json.dumps([messages, own], ensure_ascii=False), 0xF8000), ""
        marks = marks[0], chr(ord(marks[0]) + 1)
        values = {"messages": messages, "tools": None, "documents": None, **self._special_tokens, **own}
        try:
            written = self._compiled.render(**values, add_generation_prompt=prompt, **{_MARKS: marks})
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{where}: the chat template ({self.origin}) does not take this conversation: {error}. Correct or "
                "remove the record."
            ) from error
        pieces = written.split(marks[0])
        text, spans = pieces[0], []
        for piece in pieces[1:]:
            inside, _, after = piece.partition(marks[1])
            spans.append((len(text), len(text) + len(inside)))
            text += inside + after
        return text, spans or None

    def _check_joins(
        self,
        messages: list[dict[str, Any]],
        context: Mapping[str, Any],
        disguised: str,
        where: str,
        control: ControlTokens,
    ) -> None:
        """A text must not become a control token together with what the template writes around it."""
        inert = _unused(json.dumps([messages, context], ensure_ascii=False) + disguised)

        def fenced(text: str) -> str:
            return f"{inert}{text}{inert}" if control.may_join(text) else text

        apart = [
            {key: value if key == "role" else _mapped(value, fenced) for key, value in message.items()}
            for message in messages
        ]
        if apart == messages:
            return
        written, _ = self._render(apart, context, where)
        names = [[text[start:end] for start, end in control.spelled(text)] for text in (disguised, written)]
        if len(names[0]) > len(names[1]):
            raise DataError(
                f"{where}: the chat template ({self.origin}) joins a message's text with its own to a control token. "
                "Remove the token's name from the text, or the record."
            )

    def _disguised(
        self,
        chat: Chat,
        messages: list[dict[str, Any]],
        text: str,
        where: str,
        control: ControlTokens,
    ) -> str:
        """`text` with the characters replaced by which a message's text spells a control token.

        A token that the template looks for in an answer (like `</think>`, to part reasoning from it) is the template's
        to read: there it stays as it is where it comes first, or everywhere if the text would differ otherwise.

        Raises:
            DataError: the template makes another text of the disguised messages.
        """
        inert = _unused(json.dumps([chat.messages, chat.context], ensure_ascii=False))
        hide = partial(_hide, spelled=control.spelled, inert=inert)
        context = _mapped(chat.context, hide)
        for times in (1, len(text)):
            hidden = [_mapped(message, hide) for message in messages]
            for message, given in zip(hidden, messages, strict=True):
                if given["role"] == "assistant" and isinstance(given.get("content"), str):
                    message["content"] = hide(given["content"], kept=self._looked_for, times=times)
            if hidden == messages and context == chat.context:
                return text
            with suppress(DataError):
                written, _ = self._render(hidden, context, where)
                if len(written) == len(text) and all(a in (b, inert) for a, b in zip(written, text, strict=True)):
                    return written
        raise DataError(
            f"{where}: the text of a message spells a control token, and the chat template ({self.origin}) treats it "
            "in another way. Remove the token's name from the text, or the record."
        )

    def _span(
        self, messages: list[dict[str, Any]], i: int, context: Mapping[str, Any], text: str, where: str
    ) -> tuple[int, int]:
        """Characters of turn `i`, from the end of its generation prompt."""
        before, _ = self._render(messages[:i], context, where) if i else ("", None)
        prompt, _ = self._render(messages[:i], context, where, prompt=True) if i else ("", None)
        after, _ = self._render(messages[: i + 1], context, where)
        if not text.startswith(after) or not after.startswith(before):
            raise DataError(
                f"{where}: the chat template ({self.origin}) writes message {i + 1} otherwise when others follow it "
                "(it may drop earlier reasoning), so its loss has no place. Set the message's weight to 0, or make a "
                "record that ends with it."
            )
        start = _common_prefix(prompt, after)
        return max(start, len(before)), len(after)


def _common_prefix(prompt: str, text: str) -> int:
    """Length of the common prefix; a name in angle brackets that they share only in part is left out."""
    length = next(
        (i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text))
    )
    if length < len(prompt):
        opened = prompt.rfind("<", 0, length)
        if opened >= 0 and ">" not in prompt[opened:length]:
            return opened
    return length


def _hide(
    text: str,
    *,
    spelled: Callable[[str], Sequence[tuple[int, int]]],
    inert: str,
    kept: Collection[str] = (),
    times: int = 0,
) -> str:
    """`text` with the characters of control tokens' names replaced, except of those in `kept` so many times each."""
    found = spelled(text)
    seen: Counter[str] = Counter()
    for start, end in found:
        name = text[start:end].strip()
        seen[name] += 1
        if name not in kept or seen[name] > times:
            text = text[:start] + inert * (end - start) + text[end:]
    return text


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _unused(text: str, first: int = 0xF0000) -> str:
    """A character of the private use area that `text` does not hold, nor the one after it."""
    while chr(first) in text or chr(first + 1) in text:
        first += 2
    return chr(first)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own name and type

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def marked(self, context: Any, caller: Callable[[], str]) -> str:
        """The block's text between this rendering's marks."""
        begin, end = context[_MARKS]
        return f"{begin}{caller()}{end}"


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
