"""A response ends at the end tokens of the student and the teacher, in rollouts, prefixes and evaluation."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tiny_models import tiny_tokenizer
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.end_tokens import EndTokens, closing_token, end_tokens, served_end_ids
from tropd_mcore.errors import ConfigError, DataError

END_OF_TEXT, TURN_START, TURN_END = 0, 1, 2
INSTRUCTED = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write(
    folder: Path,
    *,
    eos: str = "<|endoftext|>",
    template: str | None = None,
    generation: Any = None,
    config: Any = None,
    added: tuple[str, ...] = (),
) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(added))
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


def wanted(*tokens: str) -> Any:
    """The part of a configuration that is read."""
    return SimpleNamespace(rollout=SimpleNamespace(end_tokens=tokens or None))


def found(student: Path, teacher: Path, *tokens: str) -> EndTokens:
    return end_tokens(wanted(*tokens), Renderer(student), teacher)


def test_a_base_student_stops_at_the_end_of_turn_of_its_instructed_teacher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = write(tmp_path / "base")
    teacher = write(tmp_path / "instructed", eos="<|im_end|>", template=INSTRUCTED, generation=[TURN_END, END_OF_TEXT])
    with caplog.at_level(logging.INFO):
        ends = found(student, teacher)
    assert Renderer(student).eos_ids == (END_OF_TEXT,)
    assert ends.ids == (END_OF_TEXT, TURN_END)
    assert ends.sources[TURN_END] == ("teacher tokenizer", "teacher generation_config.json", "teacher chat template")
    assert ends.sources[END_OF_TEXT] == ("student tokenizer", "teacher generation_config.json")
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert "a response ends at '<|endoftext|>' 0 (student tokenizer; teacher generation_config.json)" in caplog.text


def test_the_end_token_of_a_multimodal_teacher_is_read_from_its_language_model(tmp_path: Path) -> None:
    student, teacher = write(tmp_path / "student"), write(tmp_path / "teacher")
    (teacher / "config.json").write_text(json.dumps({"model_type": "any", "text_config": {"eos_token_id": TURN_END}}))
    assert found(student, teacher).sources[TURN_END] == ("teacher config.json",)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ({"generation": TURN_END}, "generation_config.json"),
        ({"generation": [TURN_END]}, "generation_config.json"),
        ({"config": TURN_END}, "config.json"),
        ({"config": [TURN_END, END_OF_TEXT]}, "config.json"),
        ({"eos": "<|im_end|>"}, "tokenizer"),
        ({"template": INSTRUCTED}, "chat template"),
    ],
)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_every_source_of_end_tokens_counts_for_student_and_teacher(
    tmp_path: Path, place: dict[str, Any], value: str, who: str
) -> None:
    folders = {name: write(tmp_path / name, **(place if name == who else {})) for name in ("student", "teacher")}
    ends = found(folders["student"], folders["teacher"])
    assert set(ends.ids) == {END_OF_TEXT, TURN_END}
    assert f"{who} {value}" in ends.sources[TURN_END]


def test_an_end_token_that_the_student_lacks_is_left_out_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = write(tmp_path / "student")
    teacher = write(tmp_path / "teacher", eos="<|return|>", added=("<|return|>",), generation=[END_OF_TEXT])
    ends = found(student, teacher)
    assert ends.ids == (END_OF_TEXT,)
    assert "teacher ends a response with '<|return|>', which the student lacks: it is left out" in caplog.text
    assert len(served_end_ids(ends.ids, teacher)) == 2  # the teacher's server always stops there


def test_an_end_id_that_is_not_a_token_is_left_out_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = write(tmp_path, generation=[END_OF_TEXT, 5000])
    assert found(student, student).ids == (END_OF_TEXT,)
    assert "generation_config.json names end token 5000, which its tokenizer lacks" in caplog.text


def test_the_key_sets_the_end_tokens_and_a_template_that_closes_differently_gives_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = write(tmp_path / "student")
    teacher = write(tmp_path / "teacher", eos="<|im_end|>", template=INSTRUCTED)
    ends = found(student, teacher, "<|endoftext|>", "<|im_start|>")
    assert ends.ids == (END_OF_TEXT, TURN_START) and ends.sources[TURN_START] == ("rollout.end_tokens",)
    assert "the chat template of the teacher closes a turn with '<|im_end|>', which ends no response" in caplog.text
    assert "add it to rollout.end_tokens" in caplog.text


def test_a_key_with_end_tokens_that_are_unknown_or_ignored_by_the_server_is_refused_with_all_problems(
    tmp_path: Path,
) -> None:
    student = write(tmp_path, generation=[TURN_END])
    with pytest.raises(ConfigError) as caught:
        found(student, student, "<|im_end|>", "<|eot|>", "two words")
    assert caught.value.problems == [
        "rollout.end_tokens: '<|eot|>' is no token of the student; give entries of its tokenizer.json",
        "rollout.end_tokens: 'two words' is no token of the student; give entries of its tokenizer.json",
        "rollout.end_tokens: the student's server stops at '<|endoftext|>' in any case (student tokenizer); add it",
    ]
    nothing: Any = SimpleNamespace(rollout=SimpleNamespace(end_tokens=()))
    with pytest.raises(ConfigError, match="rollout.end_tokens is empty"):
        end_tokens(nothing, Renderer(student), student)


@pytest.mark.parametrize(
    ("after", "token", "warned"),
    [
        ("<|im_end|>\n", "<|im_end|>", False),
        (" \n<|im_end|>", "<|im_end|>", False),
        ("\n\nUser:", None, True),
        ("[/ANSWER]", None, True),
        ("", None, False),
        ("\n", None, False),
    ],
)
def test_the_first_added_token_after_the_answer_ends_a_turn(
    tmp_path: Path, after: str, token: str | None, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}AFTER{% endif %}{% endfor %}"
    folder = write(tmp_path, template=template.replace("AFTER", f"{{{{ {after!r} }}}}"))
    renderer = Renderer(folder)
    assert closing_token(renderer.tokenizer) == (token, after)
    found(folder, folder)
    assert ("is no single token: no response ends there" in caplog.text) == warned


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0]['content'] }}"])
def test_a_template_that_rejects_or_hides_an_answer_gives_no_end_token(tmp_path: Path, template: str) -> None:
    folder = write(tmp_path, template=template)
    assert closing_token(Renderer(folder).tokenizer) == (None, None)
    assert found(folder, folder).ids == (END_OF_TEXT,)


def test_tokens_at_which_sglang_stops_by_itself_are_end_tokens(tmp_path: Path) -> None:
    folder = write(tmp_path, added=("<|eom_id|>",))
    ends = found(folder, folder)
    assert [ends.texts[index] for index in ends.ids] == ["<|endoftext|>", "<|eom_id|>"]
    assert served_end_ids((), folder) == ends.ids


def test_models_without_any_end_token_are_refused_unless_the_key_sets_one(tmp_path: Path) -> None:
    folder = write(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(DataError, match="nothing ends a response: .*set rollout.end_tokens"):
        found(folder, folder)
    assert found(folder, folder, "<|im_end|>").ids == (TURN_END,)


@pytest.mark.parametrize("eos", ["2", True, [2, None], -1, 2.5])
def test_an_end_token_that_is_not_an_id_is_refused_with_its_file(tmp_path: Path, eos: Any) -> None:
    folder = write(tmp_path, generation=eos)
    with pytest.raises(DataError, match=r"generation_config\.json: expected token ids as eos_token_id, found"):
        Renderer(folder)
