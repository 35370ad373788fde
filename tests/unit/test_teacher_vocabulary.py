"""Vocabulary agreement of two model folders, decided from their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_models import tiny_tokenizer
from tropd_mcore.errors import DataError, ModelError
from tropd_mcore.teacher.vocabulary import check_same_vocabulary


def write_folder(folder: Path, *, width: int = 307, added: tuple[str, ...] = ()) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": width}))
    return folder


def rename(folder: Path, old: str, new: str) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[new] = vocabulary.pop(old)
    path.write_text(json.dumps(content))


def test_widths_may_differ_by_padding(tmp_path: Path) -> None:
    student = write_folder(tmp_path / "student", width=307, added=("<think>",))
    teacher = write_folder(tmp_path / "teacher", width=512, added=("<think>",))
    check_same_vocabulary(student, teacher)


def test_one_renamed_token_is_two_differences(tmp_path: Path) -> None:
    student, teacher = write_folder(tmp_path / "student"), write_folder(tmp_path / "teacher")
    rename(teacher, "A", "AA")
    with pytest.raises(
        DataError, match=r"differ in 2 of \d+ tokens \(first: 'A' is \d+ and absent; 'AA' is absent and"
    ):
        check_same_vocabulary(student, teacher)


def test_added_tokens_count_and_only_the_first_differences_are_shown(tmp_path: Path) -> None:
    student = write_folder(tmp_path / "student", added=("<a>", "<b>", "<c>", "<d>"))
    teacher = write_folder(tmp_path / "teacher", added=("<d>", "<c>", "<b>", "<a>", "<e>", "<f>"))
    with pytest.raises(DataError, match=r"differ in 6 of") as caught:
        check_same_vocabulary(student, teacher)
    assert str(caught.value).count("' is ") == 5


def test_a_width_below_the_tokenizer_is_refused(tmp_path: Path) -> None:
    student, teacher = write_folder(tmp_path / "student"), write_folder(tmp_path / "teacher", width=100)
    with pytest.raises(DataError, match=r"teacher.path=.*: vocab_size is 100 but the tokenizer has ids up to \d+"):
        check_same_vocabulary(student, teacher)


def test_a_folder_without_tokenizer_or_config_is_named(tmp_path: Path) -> None:
    student, teacher = write_folder(tmp_path / "student"), write_folder(tmp_path / "teacher")
    (teacher / "config.json").unlink()
    with pytest.raises(ModelError, match=r"teacher/config.json: cannot be read"):
        check_same_vocabulary(student, teacher)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: expected a tokenizer there"):
        check_same_vocabulary(tmp_path / "empty", teacher)
