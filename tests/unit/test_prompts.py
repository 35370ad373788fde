"""Prompts are checked for all requirements of the run. The prompts of a step depend only on seed and step."""

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
from tropd_mcore.config.schema import DataConfig, VerifierConfig
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.prompts import PromptNeeds, PromptSet, load_prompts
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


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**32))
def test_every_epoch_is_a_permutation_of_the_prompts_and_epochs_follow_without_a_gap(size, count, seed):
    prompts = prompt_set(size, seed=seed)
    steps = -(-3 * size // count)
    served = [name for step in range(steps) for name in names(prompts.at_step(step, count))]
    for number in range(len(served) // size):
        assert Counter(served[number * size : (number + 1) * size]) == Counter(f"p{i}" for i in range(size))


def test_the_prompts_of_a_step_do_not_depend_on_earlier_calls():
    fresh, used = prompt_set(23), prompt_set(23)
    for step in (9, 0, 31, 4):
        used.at_step(step, 5)
    assert names(fresh.at_step(17, 5)) == names(used.at_step(17, 5))


def test_every_epoch_and_every_seed_has_a_different_order():
    orders = {tuple(names(prompt_set(50, seed=seed).at_step(step, 50))) for seed in (1, 2) for step in (0, 1)}
    assert len(orders) == 4


def test_without_shuffling_the_order_is_that_of_the_file():
    assert names(prompt_set(4, shuffle=False).at_step(1, 3)) == ["p3", "p0", "p1"]


def test_all_prompts_that_are_too_long_or_empty_are_reported_together(tmp_path, renderer):
    lines = [{"id": "short", "prompt": "ab"}, {"id": "long", "prompt": "zz " * 50}, {"id": "none", "prompt": ""}]
    config = DataConfig(prompts=write_lines(tmp_path / "prompts.jsonl", lines), max_prompt_tokens=20)
    with pytest.raises(DataError) as caught:
        load_prompts(config, renderer, seed=1)
    too_long, empty = str(caught.value).split("\n")
    assert re.search(r"prompts\.jsonl:2: prompt 'long' has \d+ tokens but data\.max_prompt_tokens is 20", too_long)
    assert re.search(r"prompts\.jsonl:3: prompt 'none': `prompt` has no text", empty)


def test_a_prompt_may_have_as_many_tokens_as_the_key_says(tmp_path, renderer):
    path = write_lines(tmp_path / "prompts.jsonl", [{"id": "full", "prompt": "zz " * 5}])
    (prompt,) = load_prompts(DataConfig(prompts=path, max_prompt_tokens=1000), renderer, seed=1).prompts
    tokens = len(prompt.token_ids)
    load_prompts(DataConfig(prompts=path, max_prompt_tokens=tokens), renderer, seed=1)
    with pytest.raises(DataError, match=f"has {tokens} tokens but data.max_prompt_tokens is {tokens - 1}"):
        load_prompts(DataConfig(prompts=path, max_prompt_tokens=tokens - 1), renderer, seed=1)


def test_responses_of_other_prompts_are_refused(tmp_path, renderer):
    prompts = write_lines(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x"}])
    responses = write_lines(tmp_path / "r.jsonl", [{"id": "b", "response_ids": [1]}])
    with pytest.raises(DataError, match=r"data\.teacher_responses belongs to other prompts"):
        load_prompts(
            DataConfig(prompts=prompts, teacher_responses=responses),
            renderer,
            seed=1,
            needs=PromptNeeds(responses="guidance needs it"),
        )


def test_responses_that_are_not_needed_may_belong_to_other_prompts(tmp_path, renderer):
    prompts = write_lines(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x"}])
    responses = write_lines(tmp_path / "r.jsonl", [{"id": "b", "response_ids": [1]}])
    found = load_prompts(DataConfig(prompts=prompts, teacher_responses=responses), renderer, seed=1)
    assert found.prompts[0].teacher_response_ids is None


def test_stored_responses_are_matched_by_id_without_their_end_token(tmp_path, renderer):
    prompts = write_lines(tmp_path / "p.jsonl", [{"id": name, "prompt": name} for name in "abc"])
    eos = renderer.eos_ids[0]
    responses = [
        {"id": "c", "response_ids": [7, 6, 8, eos, eos], "finished": True},
        {"id": "a", "response_ids": [9]},
        {"id": "unused", "response_ids": [5]},
    ]
    config = DataConfig(prompts=prompts, teacher_responses=write_lines(tmp_path / "r.jsonl", responses), shuffle=False)
    loaded = load_prompts(config, renderer, seed=1)
    a, b, c = loaded.prompts
    assert a.teacher_response_ids.tolist() == [9] and b.teacher_response_ids is None
    assert c.teacher_response_ids.tolist() == [7, 6, 8]
    assert loaded.longest_response == 3
    assert loaded.longest_prompt == max(len(renderer.prompt_ids(name)) for name in "abc")
    with pytest.raises(DataError, match="holds id 6, which ends a response"):
        load_prompts(config, renderer, seed=1, needs=PromptNeeds(end_ids=(6,)))


def problems_with(needs: PromptNeeds, renderer: Renderer, prompts: Path, responses: Path | None = None) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_prompts(DataConfig(prompts=prompts, teacher_responses=responses), renderer, seed=1, needs=needs)
    return str(caught.value).split("\n")


def test_a_prompt_without_a_stored_response_is_refused_if_guidance_will_use_it(tmp_path, renderer):
    """One of 40: without the check, the run dies at the step that draws it."""
    prompts = write_lines(tmp_path / "p.jsonl", [{"id": f"p{i}", "prompt": "x"} for i in range(40)])
    lines = [{"id": f"p{i}", "response_ids": [5]} for i in range(40) if i != 27]
    responses = write_lines(tmp_path / "r.jsonl", lines)
    load_prompts(DataConfig(prompts=prompts, teacher_responses=responses), renderer, seed=1)
    (problem,) = problems_with(PromptNeeds(responses="guidance needs it"), renderer, prompts, responses)
    assert "p.jsonl:28: prompt 'p27' has no response in data.teacher_responses=" in problem
    assert problem.endswith(", but guidance needs it")


def test_everything_that_a_run_would_lack_is_reported_at_once_by_file_and_line(tmp_path, renderer):
    prompts = write_lines(
        tmp_path / "p.jsonl",
        [
            {"id": "good", "prompt": "x", "answer": "1"},
            {"id": "unanswered", "prompt": "x"},
            {"id": "hopeless", "prompt": "x", "answer": "1\n2"},
            {"id": "both", "prompt": "zz " * 50},
            {"id": "unknown", "prompt": "x", "label": "1"},
            {"id": "bad response", "prompt": "x", "answer": "1"},
        ],
    )
    lines = [{"id": name, "response_ids": [5]} for name in ("good", "unanswered", "hopeless", "both")]
    responses = write_lines(tmp_path / "r.jsonl", [*lines, {"id": "bad response", "response_ids": [400]}])
    needs = PromptNeeds(
        responses="guidance needs it",
        answers="kdrl learns from it",
        verifier=VerifierConfig(kind="exact_match"),
        vocab_size=307,
    )
    config = DataConfig(prompts=prompts, teacher_responses=responses, max_prompt_tokens=20)
    with pytest.raises(DataError) as caught:
        load_prompts(config, renderer, seed=1, needs=needs)
    places = [re.sub(r".*/(\w\.jsonl:\d+): .*", r"\1", line) for line in str(caught.value).split("\n")]
    assert places == ["p.jsonl:2", "p.jsonl:3", "p.jsonl:4", "p.jsonl:4", "p.jsonl:5", "r.jsonl:5"]


def test_ids_beyond_the_vocabulary_are_refused_by_line(tmp_path, renderer):
    path = write_lines(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": " two"}])
    largest = int(renderer.prompt_ids(" two").max())
    load_prompts(DataConfig(prompts=path), renderer, seed=1, needs=PromptNeeds(vocab_size=largest + 1))
    (problem,) = problems_with(PromptNeeds(vocab_size=largest), renderer, path)
    assert f"p.jsonl:2: prompt 'b' holds token id {largest}; expected ids in [0, {largest})" in problem


@pytest.mark.parametrize(
    ("kind", "answer"),
    [("math_verify", ""), ("math_verify", "\\$"), ("exact_match", " "), ("exact_match", "?\n?")],
)
def test_an_answer_that_no_response_can_match_is_refused_by_line(tmp_path, renderer, kind, answer):
    path = write_lines(
        tmp_path / "p.jsonl", [{"id": "a", "prompt": "x", "answer": "5"}, {"id": "b", "prompt": "x", "answer": answer}]
    )
    (problem,) = problems_with(PromptNeeds(verifier=VerifierConfig(kind=kind)), renderer, path)
    assert "p.jsonl:2: prompt 'b': " in problem and "`answer`" in problem
    load_prompts(DataConfig(prompts=path), renderer, seed=1, needs=PromptNeeds(verifier=VerifierConfig()))


def test_only_the_first_prompts_are_checked_if_there_is_a_limit(tmp_path, renderer):
    path = write_lines(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x", "answer": "5"}, {"id": "b", "prompt": "x"}])
    needs = PromptNeeds(answers="it is judged", limit=1)
    assert names(load_prompts(DataConfig(prompts=path), renderer, seed=1, needs=needs).prompts) == ["a"]
