"""Do two models mean the same string by a token id? Decided from the two folders, without loading a model.

Not for translating between tokenizers: a teacher with another vocabulary is refused. Invariant: what passes has the
same id for every string, added and special tokens included, and embedding widths that hold them all.
"""

from __future__ import annotations

import json
from pathlib import Path

from tropd_mcore.errors import DataError, ModelError

SHOWN_DIFFERENCES = 5


def check_same_vocabulary(student_folder: Path, other_folder: Path, *, key: str = "teacher.path") -> None:
    """Return where the two vocabularies agree; the widths (config `vocab_size`) may differ by padding only.

    `key` is the configuration key of the second folder. Raises DataError listing the first differences and how many
    there are, ModelError where a folder lacks its config.
    """
    student, other = read_vocabulary(student_folder), read_vocabulary(other_folder)
    differences = _differences(student, other)
    if differences:
        shown = "; ".join(differences[:SHOWN_DIFFERENCES])
        raise DataError(
            f"student.path={student_folder} and {key}={other_folder} differ in {len(differences)} of "
            f"{len(student.keys() | other.keys())} tokens (first: {shown}): choose {key} from the student's family"
        )
    _check_width("student.path", student_folder, student)
    _check_width(key, other_folder, other)


def _check_width(key: str, folder: Path, vocabulary: dict[str, int]) -> None:
    width, needed = read_width(folder), max(vocabulary.values()) + 1
    if width < needed:
        raise DataError(f"{key}={folder}: vocab_size is {width} but the tokenizer has ids up to {needed - 1}")


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Return token string -> id of the tokenizer in `folder`, added and special tokens included. Raises DataError."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise DataError(f"{folder}: expected a tokenizer there (tokenizer.json)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: the tokenizer cannot be read: {error}") from error
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if not vocabulary:
        raise DataError(f"{folder}: the tokenizer has no tokens")
    return vocabulary


def read_width(folder: Path) -> int:
    """Return `vocab_size` of the model in `folder`: rows of its embedding. Raises ModelError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    width = config.get("vocab_size") if isinstance(config, dict) else None
    if not isinstance(width, int):
        raise ModelError(f"{path}: expected an integer vocab_size, found {width!r}")
    return width


def _differences(student: dict[str, int], other: dict[str, int]) -> list[str]:
    """One text a token that is not the same in both, by ascending id."""
    different = [token for token in student.keys() | other.keys() if student.get(token) != other.get(token)]
    different.sort(key=lambda token: (student.get(token, other.get(token, 0)), token))
    return [f"{token!r} is {student.get(token, 'absent')} and {other.get(token, 'absent')}" for token in different]
