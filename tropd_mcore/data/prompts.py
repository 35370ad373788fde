"""Prompts and stored teacher responses, read once and served by step.

Not for guidance (`requests`) or sampling. Invariants: every problem of a file is reported at once, with its line; the
prompts of a step are a pure function of (file, seed, step), so a resumed run needs no cursor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tropd_mcore.config.schema import DataConfig
from tropd_mcore.data.chat import Renderer
from tropd_mcore.errors import DataError
from tropd_mcore.types import IntArray, Prompt

SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class PromptRecord:
    """One line of a prompt file."""

    prompt_id: str
    prompt: str | list[dict[str, str]]
    answer: str | None
    line: int


class PromptSet:
    """All prompts, in the order of each pass."""

    def __init__(self, prompts: list[Prompt], *, shuffle: bool, seed: int) -> None:
        assert prompts, "a prompt set without prompts"
        self.prompts = prompts
        self._shuffle = shuffle
        self._order = lru_cache(maxsize=2)(lambda number: _permutation(len(prompts), seed, number))

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def longest_response(self) -> int:
        """Tokens of the longest stored teacher response, without EOS; 0 where there are none."""
        responses = (prompt.teacher_response_ids for prompt in self.prompts)
        return max((len(response) for response in responses if response is not None), default=0)

    def at_step(self, step: int, count: int) -> list[Prompt]:
        """Return the `count` prompts of `step` (from 0); passes follow each other without a gap."""
        return [self._at(position) for position in range(step * count, (step + 1) * count)]

    def _at(self, position: int) -> Prompt:
        number, index = divmod(position, len(self.prompts))
        return self.prompts[int(self._order(number)[index]) if self._shuffle else index]


def load_prompts(config: DataConfig, renderer: Renderer, *, seed: int) -> PromptSet:
    """Read and render `data.prompts` and merge `data.teacher_responses` by id. Raises DataError with every problem."""
    responses = read_responses(config.teacher_responses, renderer.eos_ids) if config.teacher_responses else {}
    prompts: list[Prompt] = []
    problems: list[str] = []
    for record in read_prompt_file(config.prompts):
        where = f"{config.prompts}:{record.line}: prompt {record.prompt_id!r}"
        try:
            token_ids = renderer.prompt_ids(record.prompt)
        except DataError as error:
            problems.append(f"{where}: {error}")
            continue
        if len(token_ids) > config.max_prompt_tokens:
            limit = config.max_prompt_tokens
            problems.append(f"{where} has {len(token_ids)} tokens but data.max_prompt_tokens is {limit}")
        prompts.append(Prompt(record.prompt_id, token_ids, record.answer, responses.get(record.prompt_id)))
    if responses and prompts and all(prompt.teacher_response_ids is None for prompt in prompts):
        problems.append(
            f"{config.teacher_responses}: none of its {len(responses)} ids is the id of a prompt in {config.prompts}; "
            "data.teacher_responses belongs to other prompts"
        )
    _raise_all(problems)
    return PromptSet(prompts, shuffle=config.shuffle, seed=seed)


def read_prompt_file(path: Path) -> list[PromptRecord]:
    """Read a JSONL file of prompts. Raises DataError with every problem found, by line."""
    records: list[PromptRecord] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    for number, line in _lines(path, "data.prompts"):
        record = _parse(line, partial(_prompt_record, line=number))
        if isinstance(record, str):
            problems.append(f"{path}:{number}: {record}")
        elif record.prompt_id in first_line:
            problems.append(
                f"{path}:{number}: id {record.prompt_id!r} stands in line {first_line[record.prompt_id]} too"
            )
        else:
            first_line[record.prompt_id] = number
            records.append(record)
    if not records and not problems:
        problems.append(f"{path}: no prompts in it; expected one JSON object a line (data.prompts)")
    _raise_all(problems)
    return records


def read_responses(path: Path, eos_ids: tuple[int, ...]) -> dict[str, IntArray]:
    """Return {prompt id: teacher response without the EOS at its end, int32}. Raises DataError with every problem."""
    responses: dict[str, IntArray] = {}
    problems: list[str] = []
    first_line: dict[str, int] = {}
    for number, line in _lines(path, "data.teacher_responses"):
        record = _parse(line, _response)
        if isinstance(record, str):
            problems.append(f"{path}:{number}: {record}")
            continue
        prompt_id, ids = record
        if prompt_id in first_line:
            problems.append(f"{path}:{number}: id {prompt_id!r} stands in line {first_line[prompt_id]} too")
            continue
        first_line[prompt_id] = number
        while ids and ids[-1] in eos_ids:
            ids.pop()
        responses[prompt_id] = np.array(ids, dtype=np.int32)
    _raise_all(problems)
    return responses


def _permutation(count: int, seed: int, number: int) -> npt.NDArray[np.int64]:
    """The order of pass `number`."""
    return np.random.Generator(np.random.Philox(key=[seed, number])).permutation(count)


def _lines(path: Path, key: str) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{key}={path}: cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _parse(line: str, convert: Callable[[dict[str, Any]], Any]) -> Any:
    """What `convert` makes of one JSON object, or a text that says what is wrong with it."""
    try:
        value = json.loads(line)
    except ValueError as error:
        return f"expected a JSON object, found {line[:60]!r} ({error})"
    if not isinstance(value, dict):
        return f"expected a JSON object, found {line[:60]!r}"
    return convert(value)


def _prompt_record(value: dict[str, Any], line: int) -> PromptRecord | str:
    prompt_id, answer = value.get("id"), value.get("answer")
    if not isinstance(prompt_id, str) or not prompt_id:
        return f"expected a text `id`, found {prompt_id!r}"
    if answer is not None and not isinstance(answer, str):
        return f"expected a text `answer` or none, found {answer!r}"
    if ("messages" in value) == ("prompt" in value):
        return "expected either `messages` or `prompt`"
    prompt: Any = value.get("prompt", value.get("messages"))
    if not (isinstance(prompt, str) or _is_chat(prompt)):
        return f"expected a text `prompt` or `messages` with `role` and `content`, found {str(prompt)[:60]!r}"
    return PromptRecord(prompt_id, prompt, answer, line)


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in messages
        )
    )


def _response(value: dict[str, Any]) -> tuple[str, list[int]] | str:
    prompt_id, ids = value.get("id"), value.get("response_ids")
    if not isinstance(prompt_id, str):
        return f"expected a text `id`, found {prompt_id!r}"
    if not isinstance(ids, list) or not all(type(index) is int and index >= 0 for index in ids):
        return f"expected `response_ids`, a list of token ids, found {str(ids)[:60]!r}"
    return prompt_id, list(ids)


def _raise_all(problems: list[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise DataError("\n".join(problems[:SHOWN_PROBLEMS] + more))
