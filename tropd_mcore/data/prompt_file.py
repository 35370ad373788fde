"""Reads the lines of `data.prompts`.

This module does not render prompts (`chat`) or check the needs of a run (`prompts`). Invariant: a returned record asks
for an answer; it does not end with one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tropd_mcore.data.chat_template import Message
from tropd_mcore.data.jsonl import Problem, parse_object, raise_problems, read_lines
from tropd_mcore.errors import DataError

KEYS: dict[str, tuple[str, ...]] = {
    "id": ("uid", "idx", "index", "prompt_id"),
    "messages": ("conversations", "conversation", "chat", "dialogue"),
    "prompt": ("text", "question", "problem", "input", "instruction", "query"),
    "answer": ("label", "solution", "ground_truth", "target", "gold", "reference", "output", "expected_answer"),
    "tools": ("functions",),
    "chat_template_kwargs": ("template_kwargs", "chat_kwargs"),
    "teacher": ("teacher_name", "teacher_id", "expert", "domain"),
}
"""The keys of a line, each with the names that other formats use for it."""

ANSWERING_ROLES = frozenset({"assistant", "model", "gpt", "bot", "chatbot", "ai"})
"""Roles, in lower case, whose turns are answers."""


@dataclass(frozen=True)
class PromptRecord:
    """One line of a prompt file."""

    prompt_id: str
    prompt: str | list[Message]
    answer: str | None
    line: int
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    """Name of its teacher; None if the line has no field `teacher`"""


def read_prompt_file(path: Path, *, key: str = "data.prompts") -> list[PromptRecord]:
    """Read a JSONL file of prompts. Raises DataError with every problem found, by line, or with `key`."""
    records, problems = scan_prompt_file(path, key=key)
    raise_problems(problems)
    return records


def scan_prompt_file(path: Path, *, key: str = "data.prompts") -> tuple[list[PromptRecord], list[Problem]]:
    """Return the valid lines and the problems of the others. Raises DataError if the file cannot be read.

    `key` is the configuration key that messages name.
    """
    records: list[PromptRecord] = []
    problems: list[Problem] = []
    first_line: dict[str, int] = {}
    for number, line in read_lines(path, key):
        try:
            record = _record(parse_object(line, KEYS), number)
            if record.prompt_id in first_line:
                raise DataError(f"id {record.prompt_id!r} stands in line {first_line[record.prompt_id]} too")
        except DataError as error:
            problems.append(Problem(number, f"{path}:{number}: {error}"))
            continue
        first_line[record.prompt_id] = number
        records.append(record)
    if not records and not problems:
        problems.append(Problem(0, f"{path}: no prompts in it; expected one JSON object per line ({key})"))
    return records, problems


def _record(value: dict[str, Any], line: int) -> PromptRecord:
    """The record of one line. Raises DataError without a place, as all functions below."""
    prompt_id, answer = value.get("id"), value.get("answer")
    if not isinstance(prompt_id, str) or not prompt_id:
        raise DataError(f"expected a text `id`, found {prompt_id!r}")
    if answer is not None and not isinstance(answer, str):
        raise DataError(f"prompt {prompt_id!r}: expected a text `answer` or none, found {answer!r}; write it in quotes")
    if ("messages" in value) == ("prompt" in value):
        found = "both" if "prompt" in value else "neither"
        raise DataError(f"prompt {prompt_id!r}: expected either `messages` or `prompt`, found {found}")
    teacher = value.get("teacher")
    if "teacher" in value and (not isinstance(teacher, str) or not teacher):
        raise DataError(
            f"prompt {prompt_id!r}: expected a name as `teacher`, found {teacher!r}; or leave the field out"
        )
    tools, template_kwargs = value.get("tools"), value.get("chat_template_kwargs")
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise DataError(f"expected a text as `prompt`, found {str(value['prompt'])[:60]!r}")
        if not value["prompt"].strip():
            raise DataError(f"prompt {prompt_id!r}: `prompt` has no text; write it or remove the line")
        if tools is not None or template_kwargs is not None:
            raise DataError("`tools` and `chat_template_kwargs` are for chats; give `messages` instead of `prompt`")
        return PromptRecord(prompt_id, value["prompt"], answer, line, teacher=teacher)
    if tools is not None and not (isinstance(tools, list) and tools and all(isinstance(t, dict) for t in tools)):
        raise DataError(f"expected `tools`, a list of JSON schemas, found {str(tools)[:60]!r}")
    if template_kwargs is not None and not isinstance(template_kwargs, dict):
        raise DataError(f"expected `chat_template_kwargs`, an object, found {str(template_kwargs)[:60]!r}")
    try:
        messages = _chat(value["messages"])
    except DataError as error:
        raise DataError(f"prompt {prompt_id!r}: {error}") from error
    return PromptRecord(prompt_id, messages, answer, line, tools, template_kwargs or {}, teacher)


def _chat(messages: Any) -> list[Message]:
    """The messages, each with a text as content."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"expected `messages`, a list with `role` and `content` in each, found {str(messages)[:60]!r}")
    chat = [_message(message, number) for number, message in enumerate(messages, start=1)]
    last = chat[-1]["role"]
    if last.lower() in ANSWERING_ROLES:
        raise DataError(
            f"`messages` end with a turn of role {last!r}, so the answer would be part of the prompt; remove that turn "
            "(a short answer to judge by belongs into `answer`)"
        )
    return chat


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        raise DataError(f"message {number}: expected `role` and `content`, found {str(message)[:60]!r}")
    # A null has no meaning, but a template that tests for the key would find it, and may use its value.
    message = {key: value for key, value in message.items() if value is not None}
    role, calls = message["role"], bool(message.get("tool_calls"))
    content = message.get("content")
    if content is None and calls:
        content = ""
    elif isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
        if kinds != ["text"]:
            raise DataError(
                f"message {number}: expected a text, or one part of type 'text', as `content`, found parts {kinds!r}; "
                "join the texts; parts of other types cannot be used"
            )
        content = content[0].get("text")
    if not isinstance(content, str):
        raise DataError(f"message {number}: expected `role` and a text as `content`, found {str(content)[:60]!r}")
    if not content.strip() and not calls and role.lower() in {"user", *ANSWERING_ROLES}:
        raise DataError(f"message {number} (role {role!r}) has no content; write it or remove the message")
    return {**message, "content": content}
