"""Checks that two model folders use the same token ids, without loading a model.

This module does not translate between tokenizers: a teacher with another vocabulary is refused. Invariant: models that
pass have the same id for every token, including added and special tokens, and embeddings wide enough for all of them.
One exception can be allowed: tokens that only the teacher has (`teacher.extra_tokens`). Their ids are returned so that
they can be excluded from the candidates.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tropd_mcore.data.tokenizer import load_tokenizer
from tropd_mcore.errors import DataError
from tropd_mcore.weights.served import read_vocab_size

SHOWN_DIFFERENCES = 5


def check_same_vocabulary(
    student_folder: Path, other_folder: Path, *, key: str = "teacher.path", allow_extra: bool = False
) -> tuple[int, ...]:
    """Return the ids, ascending, of tokens that only the other folder has; empty unless `allow_extra`.

    All other tokens must agree. The widths (config `vocab_size`) may differ only by padding. `key` is the configuration
    key of the other folder. Raises DataError with the number of differences and the first of them, and ModelError if a
    folder has no config.
    """
    student, other = read_vocabulary(student_folder), read_vocabulary(other_folder)
    folders = f"student.path={student_folder}", f"{key}={other_folder}"
    extra = {token: index for token, index in other.items() if token not in student}
    only_student = {token: index for token, index in student.items() if token not in other}
    moved = [token for token in student.keys() & other.keys() if student[token] != other[token]]
    reused = set(extra.values()) & set(student.values())
    if moved or reused or (extra and only_student):
        raise DataError(_mixed(folders, student, other, key))
    if only_student:
        raise DataError(
            f"{folders[0]} has {_tokens(only_student)} that {folders[1]} lacks; every other token has the same id in "
            f"both. Take them out of the student's tokenizer, or choose another {key}"
        )
    if extra and not allow_extra:
        raise DataError(_added(folders, extra, key))
    _check_width("student.path", student_folder, student)
    _check_width(key, other_folder, other)
    return tuple(sorted(extra.values()))


def _mixed(folders: tuple[str, str], student: dict[str, int], other: dict[str, int], key: str) -> str:
    differences = _differences(student, other)
    shown = "; ".join(differences[:SHOWN_DIFFERENCES])
    return (
        f"{folders[0]} and {folders[1]} differ in {len(differences)} of {len(student.keys() | other.keys())} tokens "
        f"(first: {shown}): choose {key} from the student's family"
    )


def _added(folders: tuple[str, str], extra: dict[str, int], key: str) -> str:
    what = (
        f"{folders[1]} adds {_tokens(extra)} to those of {folders[0]}; every token of the student has the same id there"
    )
    if not key.startswith("teacher"):
        return f"{what}. Choose another {key} without them: the student cannot learn them"
    exclude = f"{key.removesuffix('path')}extra_tokens=exclude"
    return (
        f"{what}. {exclude} takes them out of the teacher's candidates and counts them "
        "(metric teacher/excluded_candidates)"
    )


def _tokens(tokens: dict[str, int]) -> str:
    """Number of tokens, and the first of them by id."""
    first = sorted(tokens.items(), key=lambda item: item[1])[:SHOWN_DIFFERENCES]
    shown = ", ".join(f"{token!r} {index}" for token, index in first)
    return f"{_count(len(tokens))} ({shown}{', ...' if len(tokens) > len(first) else ''})"


def _count(tokens: int) -> str:
    return f"{tokens} token" + ("s" if tokens != 1 else "")


def _check_width(key: str, folder: Path, vocabulary: dict[str, int]) -> None:
    width, needed = read_vocab_size(folder), max(vocabulary.values()) + 1
    if width < needed:
        beyond = _tokens(dict(_beyond(vocabulary.items(), width)))
        raise DataError(
            f"{key}={folder}: vocab_size is {width} but the tokenizer has ids up to {needed - 1}: {beyond} without a "
            "row of the embedding; remove them from the tokenizer, or use the tokenizer that belongs to these weights"
        )


def _beyond(items: Iterable[tuple[str, int]], width: int) -> Iterable[tuple[str, int]]:
    return ((token, index) for token, index in items if index >= width)


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Return {token: id} of the tokenizer in `folder`, including added and special tokens. Raises DataError."""
    vocabulary: dict[str, int] = load_tokenizer(folder).get_vocab()
    if not vocabulary:
        raise DataError(f"{folder}: the tokenizer has no tokens")
    return vocabulary


def _differences(student: dict[str, int], other: dict[str, int]) -> list[str]:
    """One text per token that differs between the two, by ascending id."""
    different = [token for token in student.keys() | other.keys() if student.get(token) != other.get(token)]
    different.sort(key=lambda token: (student.get(token, other.get(token, 0)), token))
    return [f"{token!r} is {student.get(token, 'absent')} and {other.get(token, 'absent')}" for token in different]
