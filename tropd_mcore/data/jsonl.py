"""Reads JSONL files that users write: one object per line. All problems of a file are reported at once.

The meaning of the lines is in `prompt_file` and `responses`. Invariants: every problem names its file and line. A key
that is unknown, or that occurs twice in one object, is a problem. Every text in an object can be written as UTF-8.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tropd_mcore.errors import DataError
from tropd_mcore.file_kinds import Found, in_the_way
from tropd_mcore.files import shown

SHOWN_PROBLEMS = 10
"""Largest number of problems per file that a message lists. The others are counted."""
_HEADER = re.compile(r"[A-Za-z_][\w .-]{0,40}")
"""Name of a column in the first line of a table."""


class Problem(NamedTuple):
    """A problem of one line of a file. Line 0 stands for the file as a whole."""

    line: int
    text: str
    """Begins with the place"""


def read_lines(path: Path, key: str) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text) of every line that is not blank.

    Raises DataError with `key` if the file is missing, of another kind (parquet, gzip, CSV, one JSON array, a pipe ...)
    or not UTF-8.
    """
    place = f"{key}={shown(path)}"
    if (found := in_the_way(path)) is not None:
        raise DataError(f"{place}: expected JSONL, one object per line; {found}")
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{place}: line {line} is not UTF-8 text ({error.reason}: byte 0x{content[error.start]:02x}); save the "
            "file as UTF-8 (iconv -t utf-8)"
        ) from error
    if (other := _other_text(text)) is not None:
        raise DataError(f"{place}: expected JSONL, one object per line; {other}")
    for number, line_text in enumerate(text.split("\n"), start=1):
        if line_text.strip():
            yield number, line_text


def _other_text(text: str) -> Found | None:
    """The kind of a text whose lines cannot be objects; None if its first line may be an object."""
    if text.startswith("\ufeff"):
        return Found("a byte order mark (BOM) at the start of line 1", "save the file as UTF-8 without it")
    first = next((line for line in text.split("\n") if line.strip()), "").strip()
    if first.startswith("["):
        return Found("a JSON array", "write its elements on a line each (jq -c '.[]')")
    if first == "{":
        return Found("a JSON object over several lines", "write each object on one line (jq -c .)")
    for separator, name in ((",", "CSV"), ("\t", "tab-separated values")):
        columns = [column.strip().strip('"') for column in first.split(separator)]
        if len(columns) > 1 and all(_HEADER.fullmatch(column) for column in columns):
            return Found(f"{name} with the columns {', '.join(columns)}"[:120], "write each row as a JSON object")
    return None


def parse_object(line: str, known: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Return the object of one line. Raises DataError, without a place, with its problem.

    `known`: the allowed keys, each with the names that other formats use for it.
    """
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        if len(set(names)) < len(names):
            repeated.extend(name for name in names if names.count(name) > 1)
        return dict(items)

    value = any_object(line, pairs)
    if repeated:
        raise DataError(f"key {repeated[0]!r} occurs twice in one object; keep one")
    for key in value:
        if key not in known:
            raise DataError(f"unknown key {key!r}; {_suggestion(key, known)}")
        if (problem := half_of_a_pair(value[key])) is not None:
            raise DataError(f"prompt {value.get('id')!r}: `{key}` {problem}")
    return value


def any_object(line: str, pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return the object of one line, whatever its keys; `pairs` makes it. Raises DataError without a place."""
    try:
        value = json.loads(line, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise DataError(f"expected a JSON object, found {line[:60]!r} ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, found {line[:60]!r}")
    return value


def half_of_a_pair(value: Any) -> str | None:
    """Return the end of a message if a text in a JSON value has a lone surrogate; None if all can be written."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds \\u{ord(text[error.start]):04x}, half of a surrogate pair and no character; remove it"
    return None


def raise_problems(*of_files: Sequence[Problem]) -> None:
    """Raise DataError if there are problems: the first ones of each file, by line, and the number of the others."""
    lines = []
    for problems in of_files:
        ordered = sorted(problems, key=lambda problem: problem.line)
        lines += [problem.text for problem in ordered[:SHOWN_PROBLEMS]]
        if len(problems) > SHOWN_PROBLEMS:
            lines.append(f"... and {len(problems) - SHOWN_PROBLEMS} more")
    if lines:
        raise DataError("\n".join(lines))


def _suggestion(key: str, known: Mapping[str, tuple[str, ...]]) -> str:
    meant = next((name for name, others in known.items() if key.lower() in others), None)
    close = [meant] if meant else difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    expected = f"a line has {', '.join(known)}"
    return f"did you mean {close[0]!r}? ({expected})" if close else f"{expected}; remove the others"
