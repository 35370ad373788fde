"""Turns the rows of a data set into lines of `data.prompts`, and counts every row that does not become one.

Files are read by `dataset_rows`. Invariants: rows = lines + the sum of all counts, so nothing disappears without a
number. The text of a question is never changed; a template is only put around it. Order and ids are a pure function of
files and options.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from tropd_mcore.data.chat_template import Message
from tropd_mcore.data.dataset_rows import Row, field_of
from tropd_mcore.data.jsonl import Problem, half_of_a_pair, raise_problems
from tropd_mcore.data.prompt_file import ANSWERING_ROLES
from tropd_mcore.errors import DataError

ROLES = {"human": "user", "user": "user", "system": "system"}
"""Roles before the answer, by their names in published sets."""
SLOT = "{prompt}"
"""The place of the question in a template."""
SHORTEST_CONTAINED = 40
"""Letters and digits of a held-out question from which on it is also searched inside longer prompts. Shorter ones, such
as "Compute 2+2.", stand in other questions by chance."""
SEVERAL = object()
"""Stands for more than one answer."""


@dataclass(frozen=True)
class Columns:
    """Which columns of the set are used; a dot leads into a column of objects."""

    prompt: str
    answer: str | None = None
    id: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    """(column, value) pairs; a row counts if all of them hold"""

    def names(self) -> list[str]:
        """The columns to read, each once."""
        used = [self.prompt, self.answer, self.id, *(name for name, _ in self.where)]
        return list(dict.fromkeys(name.partition(".")[0] for name in used if name is not None))


@dataclass
class Counts:
    """Where the rows of a set went. All but `rows`, `written` and `answer_turns` are rows that became no line."""

    rows: int = 0
    other: int = 0
    """a --where condition does not hold"""
    empty: int = 0
    """no text in the prompt"""
    unanswered: int = 0
    """no answer, although a column for it was named"""
    several: int = 0
    """more than one answer"""
    repeated: int = 0
    """the prompt of an earlier row"""
    disputed: int = 0
    """prompts whose rows have different answers; none of them is kept"""
    overlapping: int = 0
    """the question of a held-out set"""
    too_long: int = 0
    """more than the allowed number of tokens"""
    beyond_limit: int = 0
    written: int = 0
    answer_turns: int = 0
    """rows whose chat went on with an answer, which was cut off"""

    @property
    def left_out(self) -> int:
        """Rows that became no line."""
        kept = ("rows", "written", "answer_turns")
        return sum(count for name, count in asdict(self).items() if name not in kept)


@dataclass(frozen=True)
class Candidate:
    """One prompt on its way into the file."""

    place: str
    number: int
    """of its row in all files, from 0"""
    messages: list[Message]
    answer: str | None
    given_id: str | None
    question: str
    """text of the last message, without the template"""


def candidates(rows: Iterable[Row], columns: Columns, counts: Counts) -> list[Candidate]:
    """Return one candidate for each different prompt of the rows. Raises DataError with all rows of a wrong type."""
    by_text: dict[str, Candidate] = {}
    disputed: set[str] = set()
    problems: list[Problem] = []
    seen: dict[str, set[str]] = {name: set() for name, _ in columns.where}
    for number, row in enumerate(rows):
        counts.rows += 1
        try:
            made = _candidate(row, number, columns, counts, seen)
        except DataError as error:
            problems.append(Problem(number, f"{row.place}: {error}"))
            continue
        if made is None:
            continue
        key = json.dumps([_plain(message["content"]) for message in made.messages])
        earlier = by_text.setdefault(key, made)
        if earlier is not made:
            counts.repeated += 1
            if earlier.answer != made.answer:
                disputed.add(key)
    raise_problems(problems)
    if counts.rows and counts.other == counts.rows:
        raise DataError("; ".join(_no_row(name, value, seen[name]) for name, value in columns.where))
    counts.disputed = len(disputed)
    return [made for key, made in by_text.items() if key not in disputed]


def overlaps(found: list[Candidate], held_out: Iterable[str]) -> list[tuple[Candidate, str]]:
    """Return the candidates that ask a held-out question, each with that question.

    Questions are compared by their letters and digits alone. One that stands inside a longer prompt counts too, because
    sets put instructions around their questions. A question in other words is not found.
    """
    questions = {core: text for text in held_out if (core := _core(text))}
    long = [core for core in questions if len(core) >= SHORTEST_CONTAINED]
    hits = []
    for made in found:
        core = _core(made.question)
        inside = core if core in questions else next((other for other in long if other in core), None)
        if inside is not None:
            hits.append((made, questions[inside]))
    return hits


def without(found: list[Candidate], hits: list[tuple[Candidate, str]], counts: Counts) -> list[Candidate]:
    """Remove candidates that ask a held-out question."""
    gone = {made.number for made, _ in hits}
    counts.overlapping = len(gone)
    return [made for made in found if made.number not in gone]


def put_around(found: list[Candidate], template: str | None) -> list[Candidate]:
    """Put the template around the last message of each candidate."""
    if template is None:
        return found
    return [
        replace(
            made, messages=[*made.messages[:-1], {"role": "user", "content": template.replace(SLOT, made.question)}]
        )
        for made in found
    ]


def within(
    found: list[Candidate], length: Callable[[list[Message]], int], limit: int, counts: Counts
) -> list[Candidate]:
    """Remove candidates with more than `limit` tokens, as `length` counts them."""
    kept = [made for made in found if length(made.messages) <= limit]
    counts.too_long = len(found) - len(kept)
    return kept


def chosen(found: list[Candidate], limit: int | None, seed: int | None, counts: Counts) -> list[Candidate]:
    """Return the first `limit` candidates; with a seed, that many drawn at random, in the order of the files."""
    if limit is None or len(found) <= limit:
        return found
    counts.beyond_limit = len(found) - limit
    if seed is None:
        return found[:limit]
    return sorted(random.Random(seed).sample(found, limit), key=lambda made: made.number)


def lines(found: list[Candidate], name: str, counts: Counts) -> str:
    """Return the text of the prompt file. Raises DataError if the set's own ids repeat."""
    seen: dict[str, str] = {}
    written = []
    for made in found:
        prompt_id = made.given_id if made.given_id is not None else f"{name}-{made.number}"
        if prompt_id in seen:
            raise DataError(f"{made.place}: id {prompt_id!r} stands at {seen[prompt_id]} too; leave out --id-field")
        seen[prompt_id] = made.place
        line: dict[str, Any] = {"id": prompt_id, "messages": made.messages}
        if made.answer is not None:
            line["answer"] = made.answer
        written.append(json.dumps(line, ensure_ascii=False) + "\n")
    counts.written = len(written)
    assert counts.rows == counts.written + counts.left_out, counts
    return "".join(written)


def _candidate(row: Row, number: int, columns: Columns, counts: Counts, seen: dict[str, set[str]]) -> Candidate | None:
    """The candidate of a row; None if the row was counted elsewhere. Raises DataError without a place."""
    if row.value is None:
        raise DataError(row.problem)
    held = True
    for name, value in columns.where:
        found = field_of(row.value, name)
        if len(seen[name]) < 20:
            seen[name].add(str(found))
        held = held and str(found) == value
    if not held:
        counts.other += 1
        return None
    chat, went_on = _chat(field_of(row.value, columns.prompt), columns.prompt)
    counts.answer_turns += went_on
    if not chat or not chat[-1]["content"].strip():
        counts.empty += 1
        return None
    answer = None if columns.answer is None else _answer(field_of(row.value, columns.answer), columns.answer)
    if answer is SEVERAL:
        counts.several += 1
        return None
    if columns.answer is not None and answer is None:
        counts.unanswered += 1
        return None
    given = None if columns.id is None else field_of(row.value, columns.id)
    if columns.id is not None and (isinstance(given, bool) or not isinstance(given, str | int) or given == ""):
        raise DataError(f"expected a text or a number as `{columns.id}`, found {str(given)[:60]!r}")
    if (problem := half_of_a_pair([chat, answer, given])) is not None:
        raise DataError(problem)
    return Candidate(row.place, number, chat, answer, None if given is None else str(given), chat[-1]["content"])


def _chat(value: Any, name: str) -> tuple[list[Message], bool]:
    """The messages up to the question, and whether an answer followed. [] for a missing prompt."""
    if value is None:
        return [], False
    if isinstance(value, str):
        return [{"role": "user", "content": value}], False
    if not isinstance(value, list):
        raise DataError(f"expected a text or a chat as `{name}`, found {str(value)[:60]!r}")
    chat: list[Message] = []
    for turn in value:
        role, content = _turn(turn, name)
        if role.lower() in ANSWERING_ROLES:
            if not chat or chat[-1]["role"] != "user":
                raise DataError(f"expected a question before the answer in `{name}`, found {str(value)[:60]!r}")
            return chat, True
        if role.lower() not in ROLES:
            raise DataError(f"unknown role {role!r} in `{name}`; expected system, user, human or a role that answers")
        chat.append({"role": ROLES[role.lower()], "content": content})
    if chat and chat[-1]["role"] != "user":
        raise DataError(f"expected `{name}` to end with a question, found {str(value)[:60]!r}")
    return chat, False


def _turn(turn: Any, name: str) -> tuple[str, str]:
    """Role and text of a turn in either of the two usual forms."""
    for role_key, text_key in (("role", "content"), ("from", "value")):
        if isinstance(turn, dict) and isinstance(turn.get(role_key), str) and isinstance(turn.get(text_key), str):
            return turn[role_key], turn[text_key]
    raise DataError(
        f"expected turns with `role` and `content`, or `from` and `value`, in `{name}`, found {str(turn)[:60]!r}"
    )


def _answer(value: Any, name: str) -> Any:
    """The answer as text; None if there is none; SEVERAL if there are more than one. Raises DataError without a place.

    27.0 becomes 27, because tables with gaps store integers as floating-point numbers. A list of one answer, also
    written as JSON in a text, is that answer.
    """
    if isinstance(value, str):
        listed = _json_list(value)
        return (value.strip() or None) if listed is None else _answer(listed, name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, list):
        return _answer(value[0], name) if len(value) == 1 else SEVERAL if value else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"expected a text or a number as `{name}`, found {str(value)[:60]!r}")
    return str(int(value)) if value == int(value) else repr(value)


def _json_list(text: str) -> list[str] | None:
    """The texts of a JSON list of texts; None for any other text, such as the interval [0, 1]."""
    if not text.lstrip().startswith('["'):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, list) and all(isinstance(part, str) for part in value) else None


def _plain(text: str) -> str:
    """The text with all white space as single spaces: prompts that differ in nothing else are the same prompt."""
    return " ".join(text.split())


def _core(text: str) -> str:
    """Letters and digits, without case."""
    return "".join(character for character in text.casefold() if character.isalnum())


def _no_row(name: str, value: str, seen: set[str]) -> str:
    return f"no row has {name}={value}; the column has {', '.join(sorted(seen)[:10])}"
