"""Prompt files: each problem is reported with its line; the prompts of a step depend on seed and step alone."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_models import tiny_tokenizer
from tropd_mcore.config.schema import DataConfig
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.prompts import PromptSet, load_prompts, read_prompt_file, read_responses
from tropd_mcore.errors import DataError
from tropd_mcore.types import Prompt


def prompt_set(count: int, *, shuffle: bool = True, seed: int = 7) -> PromptSet:
    ids = np.array([1], dtype=np.int32)
    return PromptSet([Prompt(f"p{i}", ids, None, None) for i in range(count)], shuffle=shuffle, seed=seed)


def names(prompts: list[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in prompts]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return Renderer(folder)


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_prompt_file(path)
    return str(caught.value).split("\n")


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**32))
def test_every_pass_is_a_permutation_and_passes_follow_without_a_gap(size, count, seed):
    prompts = prompt_set(size, seed=seed)
    steps = -(-3 * size // count)
    served = [name for step in range(steps) for name in names(prompts.at_step(step, count))]
    for number in range(len(served) // size):
        assert Counter(served[number * size : (number + 1) * size]) == Counter(f"p{i}" for i in range(size))


def test_the_prompts_of_a_step_do_not_depend_on_what_was_asked_before():
    fresh, used = prompt_set(23), prompt_set(23)
    for step in (9, 0, 31, 4):
        used.at_step(step, 5)
    assert names(fresh.at_step(17, 5)) == names(used.at_step(17, 5))


def test_passes_and_seeds_have_orders_of_their_own():
    orders = {tuple(names(prompt_set(50, seed=seed).at_step(step, 50))) for seed in (1, 2) for step in (0, 1)}
    assert len(orders) == 4


def test_without_shuffling_the_order_is_that_of_the_file():
    assert names(prompt_set(4, shuffle=False).at_step(1, 3)) == ["p3", "p0", "p1"]


def test_a_file_is_read_with_chats_texts_answers_and_blank_lines(tmp_path):
    chat = [{"role": "user", "content": "two\u2028lines"}]
    lines = [{"id": "a", "messages": chat, "answer": "4"}, "", {"id": "b", "prompt": "plain", "source": "x"}]
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


def test_a_long_list_of_problems_is_cut_with_their_number(tmp_path):
    problems = problems_of(write_lines(tmp_path / "bad.jsonl", ["nonsense"] * 14))
    assert len(problems) == 11 and problems[-1] == "... and 4 more"


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe{}"])
def test_a_file_without_prompts_is_refused_and_the_key_is_named(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert "data.prompts" in problems_of(path)[0]


def test_prompts_that_are_too_long_or_empty_are_reported_together(tmp_path, renderer):
    lines = [{"id": "short", "prompt": "ab"}, {"id": "long", "prompt": "zz " * 50}, {"id": "none", "prompt": ""}]
    config = DataConfig(prompts=write_lines(tmp_path / "prompts.jsonl", lines), max_prompt_tokens=20)
    with pytest.raises(DataError) as caught:
        load_prompts(config, renderer, seed=1)
    too_long, empty = str(caught.value).split("\n")
    assert re.search(r"prompts\.jsonl:2: prompt 'long' has \d+ tokens but data\.max_prompt_tokens is 20", too_long)
    assert re.search(r"prompts\.jsonl:3: prompt 'none': the prompt has no tokens", empty)


def test_a_prompt_may_have_as_many_tokens_as_the_key_says(tmp_path, renderer):
    path = write_lines(tmp_path / "prompts.jsonl", [{"id": "full", "prompt": "zz " * 5}])
    (prompt,) = load_prompts(DataConfig(prompts=path, max_prompt_tokens=1000), renderer, seed=1).prompts
    tokens = len(prompt.token_ids)
    load_prompts(DataConfig(prompts=path, max_prompt_tokens=tokens), renderer, seed=1)
    with pytest.raises(DataError, match=f"has {tokens} tokens but data.max_prompt_tokens is {tokens - 1}"):
        load_prompts(DataConfig(prompts=path, max_prompt_tokens=tokens - 1), renderer, seed=1)


def test_stored_responses_are_merged_by_id_without_their_eos(tmp_path, renderer):
    prompts = write_lines(tmp_path / "p.jsonl", [{"id": name, "prompt": name} for name in "abc"])
    eos = renderer.eos_ids[0]
    responses = [
        {"id": "c", "response_ids": [7, eos, 8, eos, eos], "finished": True},
        {"id": "a", "response_ids": [9]},
        {"id": "unused", "response_ids": [5]},
    ]
    config = DataConfig(prompts=prompts, teacher_responses=write_lines(tmp_path / "r.jsonl", responses), shuffle=False)
    loaded = load_prompts(config, renderer, seed=1)
    a, b, c = loaded.prompts
    assert a.teacher_response_ids.tolist() == [9] and b.teacher_response_ids is None
    assert c.teacher_response_ids.tolist() == [7, eos, 8] and c.teacher_response_ids.dtype == np.int32
    assert loaded.longest_response == 3
    assert loaded.longest_prompt == max(len(renderer.prompt_ids(name)) for name in "abc")


def test_every_problem_of_a_response_file_is_reported_with_its_line(tmp_path):
    lines = [
        {"id": "a", "response_ids": [1]},
        {"id": "b", "response_ids": [1, -2]},
        {"id": "c", "response_ids": [1.5]},
        {"id": "d", "response_ids": [True]},
        {"id": 4, "response_ids": []},
        {"id": "a", "response_ids": [3]},
    ]
    with pytest.raises(DataError) as caught:
        read_responses(write_lines(tmp_path / "r.jsonl", lines), eos_ids=(2,))
    problems = str(caught.value).split("\n")
    assert [int(re.search(r"r\.jsonl:(\d+): ", problem)[1]) for problem in problems] == [2, 3, 4, 5, 6]


def test_responses_of_other_prompts_are_refused(tmp_path, renderer):
    prompts = write_lines(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x"}])
    responses = write_lines(tmp_path / "r.jsonl", [{"id": "b", "response_ids": [1]}])
    with pytest.raises(DataError, match=r"data\.teacher_responses belongs to other prompts"):
        load_prompts(DataConfig(prompts=prompts, teacher_responses=responses), renderer, seed=1)
