"""Reads stored teacher responses (`data.teacher_responses`), which guidance continues and `sft` trains on.

This module does not sample them (`rollout.prefixes`). Invariant: a returned response has at least one token and no
token that ends a response.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tropd_mcore.data.jsonl import Problem, parse_object, raise_problems, read_lines
from tropd_mcore.errors import DataError
from tropd_mcore.types import IntArray

KEYS: dict[str, tuple[str, ...]] = {
    "id": ("uid", "idx", "index", "prompt_id"),
    "response_ids": ("ids", "token_ids", "output_ids", "response", "tokens"),
    "finished": ("done", "finish_reason"),
}
"""The keys of a line, each with the names that other formats use for it."""


@dataclass(frozen=True)
class Responses:
    """The valid lines of a file, and the problems of the others."""

    by_prompt: dict[str, IntArray]
    """Prompt id -> response, without end tokens at its end"""
    cut: frozenset[str]
    """Ids of prompts whose response was cut before its end"""
    problems: list[Problem]
    bad_ids: frozenset[str]
    """Ids of prompts whose response has a problem"""


def read_responses(path: Path, eos_ids: Collection[int], *, vocab_size: int | None = None) -> dict[str, IntArray]:
    """Return {prompt id: teacher response without the end tokens at its end, int32}.

    Raises DataError with all problems: ids outside [0, vocab_size) if that is given, an end token in the middle, a
    response without tokens, unknown keys, two responses to one prompt.
    """
    found = scan_responses(path, eos_ids, vocab_size=vocab_size)
    raise_problems(found.problems)
    return found.by_prompt


def scan_responses(
    path: Path, eos_ids: Collection[int], *, vocab_size: int | None, key: str = "data.teacher_responses"
) -> Responses:
    """Like `read_responses`, but returns the problems. Raises DataError only if the file cannot be read.

    `key` is the configuration key that messages name.
    """
    by_prompt: dict[str, IntArray] = {}
    problems: list[Problem] = []
    first_line: dict[str, int] = {}
    bad: set[str] = set()
    cut: set[str] = set()
    for number, line in read_lines(path, key):
        try:
            value = parse_object(line, KEYS)
            prompt_id = value.get("id")
            if not isinstance(prompt_id, str):
                raise DataError(f"expected a text `id`, found {prompt_id!r}")
            if prompt_id in first_line:
                raise DataError(f"id {prompt_id!r} stands in line {first_line[prompt_id]} too")
            first_line[prompt_id] = number
            bad.add(prompt_id)
            by_prompt[prompt_id] = _response(value, eos_ids, vocab_size)
            bad.discard(prompt_id)
            if not value.get("finished", True):
                cut.add(prompt_id)
        except DataError as error:
            problems.append(Problem(number, f"{path}:{number}: {error}"))
    return Responses(by_prompt, frozenset(cut), problems, frozenset(bad))


def _response(value: dict[str, Any], eos_ids: Collection[int], vocab_size: int | None) -> IntArray:
    """The response of one line. Raises DataError without a place."""
    prompt_id, ids, finished = value["id"], value.get("response_ids"), value.get("finished", True)
    if not isinstance(ids, list) or not all(type(index) is int for index in ids):
        raise DataError(f"expected `response_ids`, a list of token ids, found {str(ids)[:60]!r}")
    if not isinstance(finished, bool):
        raise DataError(f"expected true or false as `finished`, found {finished!r}")
    limit = vocab_size if vocab_size is not None else 2**31
    outside = next((index for index in ids if not 0 <= index < limit), None)
    if outside is not None:
        raise DataError(
            f"the response to {prompt_id!r} holds token id {outside}; expected ids in [0, {limit}), "
            "the student's vocabulary"
        )
    end = len(ids)
    while end and ids[end - 1] in eos_ids:
        end -= 1
    if not end:
        raise DataError(f"the response to {prompt_id!r} has no tokens before its end; remove it (`tropd prefixes`)")
    inside = next((place for place in range(end) if ids[place] in eos_ids), None)
    if inside is not None:
        raise DataError(
            f"the response to {prompt_id!r} holds id {ids[inside]}, which ends a response, as token {inside + 1} of "
            f"{end}; cut it there, or see rollout.end_tokens"
        )
    return np.array(ids[:end], dtype=np.int32)
