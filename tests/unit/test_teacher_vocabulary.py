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


def test_vocabulary_widths_may_differ_by_padding(tmp_path: Path) -> None:
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


def test_added_tokens_are_compared_and_only_the_first_differences_shown(tmp_path: Path) -> None:
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
    with pytest.raises(ModelError, match=r"teacher: config.json not found"):
        check_same_vocabulary(student, teacher)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: expected a tokenizer there"):
        check_same_vocabulary(tmp_path / "empty", teacher)


def test_a_teacher_that_only_adds_tokens_gets_its_own_message_with_the_key(tmp_path: Path) -> None:
    student = write_folder(tmp_path / "student")
    added = tuple(f"<t{index}>" for index in range(7))
    teacher = write_folder(tmp_path / "teacher", added=added)
    with pytest.raises(DataError) as caught:
        check_same_vocabulary(student, teacher)
    first = len(tiny_tokenizer())
    shown = ", ".join(f"'<t{index}>' {first + index}" for index in range(5))
    message = str(caught.value)
    assert f"teacher.path={teacher} adds 7 tokens ({shown}, ...) to those of student.path={student}" in message
    assert "every token of the student has the same id there" in message and "teacher.extra_tokens=exclude" in message
    with pytest.raises(ModelError, match="config.json"):
        (teacher / "config.json").unlink()
        check_same_vocabulary(student, teacher, allow_extra=True)


def test_only_a_teacher_may_add_tokens(tmp_path: Path) -> None:
    student, other = write_folder(tmp_path / "student"), write_folder(tmp_path / "other", added=("<new>",))
    first = len(tiny_tokenizer())
    assert check_same_vocabulary(student, other, allow_extra=True) == (first,)
    assert check_same_vocabulary(student, student, allow_extra=True) == ()
    with pytest.raises(
        DataError, match=r"adds 1 token \('<new>' \d+\).*Choose another objective.reference without them"
    ) as caught:
        check_same_vocabulary(student, other, key="objective.reference")
    assert "extra_tokens" not in str(caught.value)


def test_a_student_that_adds_tokens_gets_its_own_message(tmp_path: Path) -> None:
    student, teacher = write_folder(tmp_path / "student", added=("<own>",)), write_folder(tmp_path / "teacher")
    for allow_extra in (False, True):
        with pytest.raises(DataError, match=r"student.path=.* has 1 token \('<own>' \d+\) that teacher.path=.* lacks"):
            check_same_vocabulary(student, teacher, allow_extra=allow_extra)


def test_added_tokens_do_not_excuse_a_token_with_another_id(tmp_path: Path) -> None:
    student = write_folder(tmp_path / "student", added=("<a>", "<b>"))
    teacher = write_folder(tmp_path / "teacher", added=("<b>", "<a>", "<c>"))
    with pytest.raises(DataError, match=r"differ in 3 of \d+ tokens \(first: '<a>' is \d+ and \d+"):
        check_same_vocabulary(student, teacher, allow_extra=True)


def test_a_token_without_an_embedding_row_is_named(tmp_path: Path) -> None:
    student = write_folder(tmp_path / "student")
    first = len(tiny_tokenizer())
    teacher = write_folder(tmp_path / "teacher", width=first, added=("<out>",))
    with pytest.raises(DataError, match=rf"teacher.path=.*: vocab_size is {first} but .*1 token \('<out>' {first}\)"):
        check_same_vocabulary(student, teacher, allow_extra=True)
