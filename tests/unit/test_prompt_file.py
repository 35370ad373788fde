"""Lines of a prompt file: every problem is reported with its line, and a prompt never contains its own answer."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tropd_mcore.data.prompt_file import read_prompt_file
from tropd_mcore.errors import DataError

USER = {"role": "user", "content": "What is 17 + 25?"}
GOLD = {"role": "assistant", "content": "#### 42"}


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_prompt_file(path)
    return str(caught.value).split("\n")


def test_a_prompt_file_may_contain_chats_texts_answers_and_blank_lines(tmp_path):
    chat = [{"role": "user", "content": "two\u2028lines"}]
    lines = [{"id": "a", "messages": chat, "answer": "4"}, "", {"id": "b", "prompt": "plain"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines))
    first, second = read_prompt_file(path)
    assert (first.prompt_id, first.prompt, first.answer, first.line) == ("a", chat, "4", 1)
    assert (second.prompt_id, second.prompt, second.answer, second.line) == ("b", "plain", None, 3)


def test_every_problem_of_a_prompt_file_is_reported_with_its_line(tmp_path):
    lines = [
        {"id": "ok", "prompt": "x"},
        '{"id": "cut", "prompt":',
        [1, 2],
        {"prompt": "no id"},
        {"id": "both", "prompt": "x", "messages": [{"role": "user", "content": "x"}]},
        {"id": "neither"},
        {"id": "chat", "messages": [{"role": "user"}]},
        {"id": "empty", "messages": []},
        {"id": "number", "prompt": "x", "answer": 5},
        {"id": "ok", "prompt": "again"},
    ]
    problems = problems_of(write_lines(tmp_path / "bad.jsonl", lines))
    assert [int(re.search(r"bad\.jsonl:(\d+): ", problem)[1]) for problem in problems] == list(range(2, 11))
    for problem, words in zip(
        problems,
        ("JSON object", "JSON object", "text `id`", "either", "either", "`role`", "`role`", "`answer`", "line 1 too"),
        strict=True,
    ):
        assert words in problem


def test_a_long_list_of_problems_is_shortened_and_their_number_stated(tmp_path):
    problems = problems_of(write_lines(tmp_path / "bad.jsonl", ["nonsense"] * 14))
    assert len(problems) == 11 and problems[-1] == "... and 4 more"


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe{}"])
def test_a_file_without_prompts_is_refused_and_the_key_is_named(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert "data.prompts" in problems_of(path)[0]


def problem_of(tmp_path: Path, line: Any) -> str:
    """The message for a file whose second line is `line`, without its place."""
    (problem,) = problems_of(write_lines(tmp_path / "bad.jsonl", [{"id": "good", "prompt": "x"}, line]))
    place = f"{tmp_path / 'bad.jsonl'}:2: "
    assert problem.startswith(place)
    return problem.removeprefix(place)


@pytest.mark.parametrize("role", ["assistant", "Assistant", "model", "gpt"])
def test_messages_that_end_with_an_answer_are_refused(tmp_path, role):
    """A conversation for supervised fine-tuning: its answer would be a part of the prompt."""
    line = {"id": "a", "messages": [USER, GOLD | {"role": role}], "answer": "42"}
    problem = problem_of(tmp_path, line)
    assert problem.startswith(f"prompt 'a': `messages` end with a turn of role '{role}', so the answer would be part")


def test_a_tool_call_without_its_result_counts_as_an_answer(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    assert "end with a turn of role 'assistant'" in problem_of(tmp_path, {"id": "a", "messages": [USER, call]})


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [{"role": "system", "content": ""}, USER],
        [USER, GOLD, USER],
        [USER, GOLD | {"content": None, "tool_calls": [{}]}, {"role": "tool", "content": ""}],
    ],
)
def test_messages_that_ask_for_an_answer_are_read_unchanged(tmp_path, messages):
    (record,) = read_prompt_file(write_lines(tmp_path / "p.jsonl", [{"id": "a", "messages": messages}]))
    assert [message["content"] for message in record.prompt] == [message["content"] or "" for message in messages]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([USER | {"content": " \n"}], "message 1 (role 'user') has no content"),
        ([USER, GOLD | {"content": ""}, USER], "message 2 (role 'assistant') has no content"),
        ([USER | {"content": None}], "message 1: expected `role` and a text as `content`, found 'None'"),
        ([USER | {"role": ""}], "message 1: expected `role` and `content`"),
        ([USER | {"role": 5}], "message 1: expected `role` and `content`"),
        ([{"from": "human", "value": "x"}], "message 1: expected `role` and `content`"),
        ([USER | {"content": [{"type": "image_url"}]}], "found parts ['image_url']"),
        ([USER | {"content": [{"type": "text", "text": "a"}] * 2}], "found parts ['text', 'text']; join the texts"),
        ([USER | {"content": [{"type": "text", "text": 5}]}], "a text as `content`, found '5'"),
        ([USER | {"content": []}], "found parts []"),
        ("x", "expected `messages`, a list"),
    ],
)
def test_a_message_without_text_is_refused_by_its_number(tmp_path, messages, words):
    problem = problem_of(tmp_path, {"id": "a", "messages": messages})
    assert problem.startswith("prompt 'a': ") and words in problem


def test_a_key_of_a_message_without_a_value_is_left_out(tmp_path):
    line = '{"id": "a", "messages": [{"role": "user", "content": "hi", "name": null, "tool_calls": null}]}'
    (tmp_path / "p.jsonl").write_text(line + "\n")
    (record,) = read_prompt_file(tmp_path / "p.jsonl")
    assert record.prompt == [{"role": "user", "content": "hi"}]


def test_a_content_with_a_single_text_part_is_read_as_that_text(tmp_path):
    message = {"role": "user", "content": [{"type": "text", "text": "two pears"}]}
    (record,) = read_prompt_file(write_lines(tmp_path / "p.jsonl", [{"id": "a", "messages": [message]}]))
    assert record.prompt == [{"role": "user", "content": "two pears"}]


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_a_blank_text_is_refused(tmp_path, prompt):
    assert problem_of(tmp_path, {"id": "a", "prompt": prompt}).startswith("prompt 'a': `prompt` has no text")


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("label", "did you mean 'answer'?"),
        ("ground_truth", "did you mean 'answer'?"),
        ("anwser", "did you mean 'answer'?"),
        ("conversations", "did you mean 'messages'?"),
        ("message", "did you mean 'messages'?"),
        ("question", "did you mean 'prompt'?"),
        ("source", "a line has id, messages, prompt, answer, tools, chat_template_kwargs, teacher; remove the others"),
    ],
)
def test_an_unknown_key_of_a_prompt_is_refused_with_the_likely_one(tmp_path, key, suggestion):
    problem = problem_of(tmp_path, {"id": "a", "prompt": "x", key: "5"})
    assert problem.startswith(f"unknown key {key!r}; {suggestion}")


def test_a_duplicate_key_is_refused_on_every_level(tmp_path):
    twice = '{"id": "a", "prompt": "x", "answer": "1", "answer": "2"}'
    assert problem_of(tmp_path, twice) == "key 'answer' occurs twice in one object; keep one"
    nested = '{"id": "a", "messages": [{"role": "user", "content": "x", "content": "y"}]}'
    assert problem_of(tmp_path, nested) == "key 'content' occurs twice in one object; keep one"


@pytest.mark.parametrize(
    "line",
    [
        {"id": "b", "prompt": "Let \ud835 be 3."},
        {"id": "b", "messages": [{"role": "user", "content": "Let \udc99 be 3."}]},
        {"id": "b", "prompt": "x", "answer": "\ud835"},
        {"id": "b", "messages": [USER], "tools": [{"name": "\ud835"}]},
        {"id": "b", "messages": [USER], "chat_template_kwargs": {"a": ["\udc99"]}},
        {"id": "b\ud835", "prompt": "x"},
    ],
)
def test_a_lone_surrogate_is_refused_by_line_id_and_key(tmp_path, line):
    problem = problem_of(tmp_path, line)
    assert re.search(r"prompt 'b.*': `\w+` holds \\u(d835|dc99), half of a surrogate pair", problem)
    problem.encode()


def test_a_complete_surrogate_pair_is_read_as_one_character(tmp_path):
    (record,) = read_prompt_file(write_lines(tmp_path / "p.jsonl", ['{"id": "a", "prompt": "\\ud835\\udc99"}']))
    assert record.prompt == "\U0001d499"


def test_tools_and_variables_of_a_line_are_read_with_a_chat(tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    line = {"id": "a", "messages": [USER], "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    (record,) = read_prompt_file(write_lines(tmp_path / "p.jsonl", [line]))
    assert (record.tools, record.template_kwargs) == (tools, {"enable_thinking": False})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tools": []}, "expected `tools`, a list of JSON schemas"),
        ({"tools": ["add"]}, "expected `tools`, a list of JSON schemas"),
        ({"tools": {"name": "add"}}, "expected `tools`, a list of JSON schemas"),
        ({"chat_template_kwargs": ["enable_thinking"]}, "expected `chat_template_kwargs`, an object"),
    ],
)
def test_tools_and_variables_of_another_shape_are_refused(tmp_path, changes, words):
    assert problem_of(tmp_path, {"id": "a", "messages": [USER]} | changes).startswith(words)


@pytest.mark.parametrize("changes", [{"tools": [{}]}, {"chat_template_kwargs": {}}])
def test_tools_and_variables_without_a_chat_are_refused(tmp_path, changes):
    assert "are for chats; give `messages`" in problem_of(tmp_path, {"id": "a", "prompt": "x"} | changes)


def test_an_object_that_is_nested_without_end_is_refused(tmp_path):
    deep = '{"id": "a", "prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert problem_of(tmp_path, deep).startswith("expected a JSON object, found")
