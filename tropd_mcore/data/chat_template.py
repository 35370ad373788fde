"""Renders a chat with a tokenizer's chat template into the text before the answer, and checks that nothing is lost.

This module does not make ids (`chat`). Invariants: the text depends on the chat, its variables and the given day, never
on the clock. A variable, a tool or a message that the template does not show is an error, because the model would not
see it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropd_mcore.errors import DataError, first_line

if TYPE_CHECKING:
    from jinja2.nodes import Node
    from jinja2.parser import Parser

Message = Mapping[str, Any]
"""`role`, a text as `content`, and other keys"""

GIVEN = frozenset({"messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception"})
"""Variables that chat_template_kwargs must not set: they are set elsewhere, or are functions."""
PLAIN_KEYS = frozenset({"role", "content", "tool_call_id"})
"""Keys of a message that a template need not show. tool_call_id only connects two messages."""
SURELY_SHOWN = 12
"""Length in characters from which a content found in the text cannot be there by accident."""
OTHER_CONTENT = "Zq7 kT4 other content"
"""Replaces a message's content to test whether the text changes."""


@dataclass(frozen=True)
class Chat:
    """A chat and the other inputs of its template."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    """JSON schemas of the tools"""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Template variables, such as enable_thinking"""
    today: date | None = None
    """The day that the template's `strftime_now` prints, at midnight; None = the day of the call"""


class ChatTemplate:
    """The template of transformers' `tokenizer`, read from `folder`."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self._tokenizer = tokenizer
        self._folder = folder

    def variables(self, *, with_tools: bool = False) -> frozenset[str]:
        """Return the variables that the template reads. Raises DataError if there is no template."""
        return _undeclared(self._source(with_tools))

    def text(self, chat: Chat) -> str:
        """Return the chat up to the start of the answer.

        Raises DataError if the template refuses the chat, never reads a variable, the tools or a key of a message, or
        leaves out a message.
        """
        source = self._source(chat.tools is not None)
        read = _undeclared(source)
        if chat.tools is not None and "tools" not in read:
            raise DataError("the chat template shows no tools; remove `tools`, or choose a model that was taught them")
        unknown = unread(chat.variables, read)
        if unknown is not None:
            raise DataError(f"`chat_template_kwargs`: {unknown}")
        text = self._render(chat)
        for number, message in enumerate(chat.messages):
            self._check_message(chat, number, message, source, text)
        return text

    def prints_date(self, chat: Chat) -> bool:
        """Return whether the text of a chat, which must be renderable, depends on the day."""
        if "strftime_now" not in _undeclared(self._source(chat.tools is not None)):
            return False
        days = (date(2001, 1, 1), date(2022, 12, 31))
        first, second = (self._render(Chat(chat.messages, chat.tools, chat.variables, day)) for day in days)
        return first != second

    def _source(self, with_tools: bool) -> str:
        if not self._tokenizer.chat_template:
            raise DataError(f"{self._folder}: the tokenizer has no chat template; give `prompt` instead of `messages`")
        # Of several templates, transformers uses `tool_use` if there are tools.
        source: str = self._tokenizer.get_chat_template(None, [{}] if with_tools else None)
        return source

    def _render(self, chat: Chat) -> str:
        import jinja2

        day = datetime.combine(chat.today or date.today(), time())
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(chat.messages),
                tools=list(chat.tools) if chat.tools is not None else None,
                tokenize=False,
                add_generation_prompt=True,
                # This overrides the function of the same name, which would read the clock.
                **{**chat.variables, "strftime_now": day.strftime},
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise DataError(f"the chat template refuses the messages: {first_line(error)}") from error
        return text

    def _check_message(self, chat: Chat, number: int, message: Message, source: str, text: str) -> None:
        """Raise DataError if the text does not depend on the content or on another key of the message."""

        def unchanged(changed: Message) -> bool:
            messages = [*chat.messages[:number], changed, *chat.messages[number + 1 :]]
            try:
                return self._render(Chat(messages, chat.tools, chat.variables, chat.today)) == text
            except DataError:
                return False

        content = message["content"].strip()
        surely_shown = len(content) >= SURELY_SHOWN and content in text
        if content and not surely_shown and unchanged({**message, "content": OTHER_CONTENT}):
            raise DataError(
                f"message {number + 1} (role {message['role']!r}) is not shown by the chat template; "
                "give it a role and a place that the model was taught"
            )
        for key in message.keys() - PLAIN_KEYS:
            if key not in source and unchanged({name: value for name, value in message.items() if name != key}):
                raise DataError(f"message {number + 1} has `{key}`, which the chat template never reads; remove it")


def unread(variables: Mapping[str, Any], read: frozenset[str]) -> str | None:
    """Return the problem of the first variable that the template cannot use; None if all are fine."""
    for name in variables:
        if name in GIVEN:
            return f"{name!r} cannot be set there" + ("; it is a key of the line" if name == "tools" else "")
        if name not in read or name in _own_arguments():
            own = sorted(read - GIVEN - _own_arguments())
            close = get_close_matches(name, own, n=1, cutoff=0.6)
            known = f"did you mean {close[0]!r}?" if close else f"it reads {', '.join(own) or 'no variable'}"
            return f"the chat template never reads {name!r}; {known}"
    return None


@lru_cache(maxsize=1)
def _own_arguments() -> frozenset[str]:
    """Arguments of transformers' rendering function, which cannot be template variables, except `documents`."""
    from transformers import PreTrainedTokenizerBase

    return frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents"}


@lru_cache(maxsize=16)
def _undeclared(source: str) -> frozenset[str]:
    """Variables that the template may read. Raises DataError if `source` is no valid template."""
    import jinja2
    from jinja2 import meta, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block that transformers adds to the template language to mark the assistant's text."""

        tags = {"generation"}  # noqa: RUF012 (the base class's contract)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    try:
        template = environment.parse(source)
        undeclared = meta.find_undeclared_variables(template)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template cannot be read: {first_line(error)}") from error
    # Jinja reports too many: also variables that every branch of an `if` sets first, such as Llama's system_message.
    return frozenset(undeclared & set(_read_unset(template, set())))


def _read_unset(node: Node, known: set[str]) -> Iterator[str]:
    """Yield the variables that `node` reads and that nothing before has surely set; add those that it sets to
    `known`."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        if node.ctx == "load" and node.name not in known:
            yield node.name
        elif node.ctx != "load":
            known.add(node.name)
    elif isinstance(node, nodes.If):
        yield from _read_unset(node.test, known)
        ends = []
        for branch in (node.body, node.elif_, node.else_):
            ends.append(set(known))
            for child in branch:
                yield from _read_unset(child, ends[-1])
        # With `elif`, no name of the branches counts as set. This gives too many reads, never too few.
        known |= ends[0] & ends[2] if not node.elif_ else set()
    elif isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
        children = list(node.iter_child_nodes())
        if isinstance(node, nodes.For):
            children = [node.iter, *(child for child in children if child is not node.iter)]
        inside = set(known)
        for child in children:
            yield from _read_unset(child, inside)
    else:
        children = list(node.iter_child_nodes())
        if isinstance(node, nodes.Assign | nodes.AssignBlock):
            children = [*children[1:], children[0]]
        for child in children:
            yield from _read_unset(child, known)
