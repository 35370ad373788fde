"""Stored teacher responses: only student tokens before the end of a response, and each problem with its line."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tropd_mcore.data.responses import read_responses
from tropd_mcore.errors import DataError
from tropd_mcore.rollout.prefixes import EMPTY_ATTEMPTS, ResponseSampling, generate_responses
from tropd_mcore.serving.wire import Generation
from tropd_mcore.types import Prompt

EOS = (2, 9)


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def problems_of(path: Path, lines: list[Any], vocab_size: int | None = None) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_responses(write_lines(path, lines), EOS, vocab_size=vocab_size)
    return str(caught.value).split("\n")


def test_a_stored_response_is_cut_at_its_end_token(tmp_path):
    lines = [{"id": "c", "response_ids": [7, 8, 2, 9], "finished": True}, {"id": "a", "response_ids": [1]}]
    found = read_responses(write_lines(tmp_path / "r.jsonl", lines), EOS)
    assert {name: ids.tolist() for name, ids in found.items()} == {"c": [7, 8], "a": [1]}
    assert found["c"].dtype == np.int32


def test_every_problem_of_a_response_file_is_reported_with_its_line(tmp_path):
    lines = [
        {"id": "a", "response_ids": [1]},
        {"id": "b", "response_ids": [1, -2]},
        {"id": "c", "response_ids": [1.5]},
        {"id": "d", "response_ids": [True]},
        {"id": 4, "response_ids": []},
        {"id": "a", "response_ids": [3]},
        {"id": "e", "response_ids": [4, 10]},
        {"id": "f", "response_ids": [2, 9]},
        {"id": "g", "response_ids": [4, 9, 5, 2]},
        {"id": "h", "response_ids": [4], "finished": "yes"},
    ]
    problems = problems_of(tmp_path / "r.jsonl", lines, vocab_size=10)
    assert [int(re.search(r"r\.jsonl:(\d+): ", problem)[1]) for problem in problems] == list(range(2, 11))
    words = (
        "the response to 'b' holds token id -2; expected ids in [0, 10)",
        "a list of token ids",
        "a list of token ids",
        "expected a text `id`",
        "stands in line 1 too",
        "the response to 'e' holds token id 10; expected ids in [0, 10)",
        "the response to 'f' has no tokens before its end",
        "the response to 'g' holds id 9, which ends a response, as token 2 of 3",
        "expected true or false as `finished`, found 'yes'",
    )
    assert all(word in problem for word, problem in zip(words, problems, strict=True))


@pytest.mark.parametrize("key", ["response", "output_ids", "respons_ids"])
def test_an_unknown_key_of_a_response_is_refused_with_the_likely_one(tmp_path, key):
    (problem,) = problems_of(tmp_path / "r.jsonl", [{"id": "a", key: [1]}])
    assert f"r.jsonl:1: unknown key {key!r}; did you mean 'response_ids'?" in problem


def generated(path: Path, answers: dict[int, list[list[int]]], *, temperature: float = 1.0) -> list[int]:
    """Run `generate_responses` on one prompt per entry of `answers`: first token -> its answers, the last one for ever.

    Returns the first tokens of the prompts in the order in which they were asked.
    """
    asked: list[int] = []

    def generate(requests: list[Any]) -> list[Generation]:
        found = []
        for request in requests:
            first = int(request.input_ids[0])
            ids = answers[first][min(asked.count(first), len(answers[first]) - 1)]
            asked.append(first)
            found.append(Generation(np.array(ids, np.int32), np.zeros(len(ids), np.float32), "stop", ("x",)))
        return found

    server = SimpleNamespace(spec=SimpleNamespace(key="teacher.server"))
    client: Any = SimpleNamespace(infos=list, generate=generate, first=server)
    prompts = [Prompt(f"p{first}", np.array([first, 4], np.int32), None, None) for first in answers]
    sampling = ResponseSampling(
        max_new_tokens=4, temperature=temperature, top_p=1.0, eos_ids=EOS, vocab_size=50, served_width=50
    )
    generate_responses(client, prompts, path, sampling)
    return asked


def test_a_prompt_with_an_empty_response_is_asked_again(tmp_path, caplog):
    asked = generated(tmp_path / "r.jsonl", {3: [[7, 2]], 5: [[2], [2], [8, 2]]})
    assert asked == [3, 5, 5, 5]
    found = read_responses(tmp_path / "r.jsonl", EOS)
    assert {name: ids.tolist() for name, ids in found.items()} == {"p3": [7], "p5": [8]}
    assert "ended at once" not in caplog.text


@pytest.mark.parametrize(("temperature", "times"), [(1.0, EMPTY_ATTEMPTS), (0.0, 1)])
def test_prefixes_reports_which_responses_training_will_refuse(tmp_path, caplog, temperature, times):
    asked = generated(tmp_path / "r.jsonl", {3: [[7, 2]], 5: [[2]]}, temperature=temperature)
    assert asked.count(5) == times
    assert f"the teacher ended at once on 1 prompts, {times} times each, the first is 'p5'" in caplog.text
    with pytest.raises(DataError, match=r"r\.jsonl:2: the response to 'p5' has no tokens before its end"):
        read_responses(tmp_path / "r.jsonl", EOS)


def test_an_id_too_large_for_an_array_gives_one_line_and_no_traceback(tmp_path):
    (problem,) = problems_of(tmp_path / "r.jsonl", [{"id": "a", "response_ids": [10**10]}])
    assert "holds token id 10000000000" in problem
