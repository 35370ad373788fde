"""Scoring a model: what is asked, what counts as right, and what the intervals promise."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_models import tiny_tokenizer
from tropd_mcore.data.chat import Renderer
from tropd_mcore.errors import DataError, ServerError
from tropd_mcore.evaluation.evaluate import (
    EvaluationResult,
    EvaluationSettings,
    compare,
    describe,
    evaluate,
    load_result,
    weights_hash,
)
from tropd_mcore.evaluation.statistics import clustered_interval, paired_difference_interval, wilson_interval
from tropd_mcore.serving.wire import Generation, GenerationRequest

ANSWERS = ["3", "4", "7", "10", "12"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def settings(tmp_path) -> EvaluationSettings:
    lines = [json.dumps({"id": f"p{i}", "prompt": f"sum {i}", "answer": a}) for i, a in enumerate(ANSWERS)]
    path = tmp_path / "heldout.jsonl"
    path.write_text("\n".join(lines))
    return EvaluationSettings(prompts=str(path), max_new_tokens=24, samples=2, temperature=0.7, top_p=0.9)


class Server:
    """Answers the prompt `sum <i>` with `#### <texts[i]>`; the second sample of a prompt is always wrong."""

    def __init__(self, texts: list[str], reason: str = "stop") -> None:
        self.texts, self.reason = texts, reason
        self.calls: list[list[GenerationRequest]] = []
        self.tokenizer = tiny_tokenizer()

    def __call__(self, requests: list[GenerationRequest]) -> list[Generation | ServerError]:
        self.calls.append(requests)
        seen: set[int] = set()
        answers: list[Generation | ServerError] = []
        for request in requests:
            index = int(self.tokenizer.decode(request.input_ids.tolist()).split()[1])
            text = f"#### {self.texts[index]}" if index not in seen else "#### wrong"
            seen.add(index)
            ids = np.array([*self.tokenizer.encode(text), self.tokenizer.eos_token_id], dtype=np.int32)
            answers.append(Generation(ids, np.zeros(len(ids), np.float32), self.reason, ("default",)))
        return answers


def result_of(model: Path, settings: EvaluationSettings, texts: list[str]) -> EvaluationResult:
    return evaluate(model, Server(texts), settings)


def test_greedy_asks_once_a_prompt_at_temperature_0_and_sampling_as_set(model, settings):
    server = Server(ANSWERS)
    evaluate(model, server, settings)
    greedy, sampled = server.calls
    assert len(greedy) == 5 and {(r.temperature, r.top_p) for r in greedy} == {(0.0, 1.0)}
    assert len(sampled) == 10 and {(r.temperature, r.top_p) for r in sampled} == {(0.7, 0.9)}
    renderer = Renderer(model)
    for index, request in enumerate(greedy):
        assert request.input_ids.tolist() == renderer.prompt_ids(f"sum {index}").tolist()
        assert request.max_new_tokens == 24 and request.stop_token_ids == renderer.eos_ids


def test_right_answers_are_counted_by_prompt_and_by_sample(model, settings):
    result = result_of(model, settings, ["3", "4", "8", "10", "nothing"])
    assert result.greedy_correct == [True, True, False, True, False]
    assert (result.greedy.correct, result.greedy.total, result.greedy.accuracy) == (3, 5, 0.6)
    assert (result.greedy.low, result.greedy.high) == wilson_interval(3, 5)
    assert (result.sampled.correct, result.sampled.total, result.sampled.accuracy) == (3, 10, 0.3)
    assert (result.sampled.low, result.sampled.high) == clustered_interval([0.5, 0.5, 0.0, 0.5, 0.0])


def test_lengths_count_the_end_token_and_truncation_is_the_server_s_word(model, settings):
    tokenizer = tiny_tokenizer()
    expected = np.mean([len(tokenizer.encode(f"#### {answer}")) + 1 for answer in ANSWERS])
    assert result_of(model, settings, ANSWERS).mean_length == pytest.approx(expected)
    assert result_of(model, settings, ANSWERS).truncated == 0.0
    assert evaluate(model, Server(ANSWERS, reason="length"), settings).truncated == 1.0


def test_without_samples_only_the_greedy_answers_are_asked_for(model, settings):
    server = Server(ANSWERS)
    result = evaluate(model, server, replace(settings, samples=0, limit=2))
    assert [len(call) for call in server.calls] == [2] and result.sampled is None and result.greedy.total == 2


def test_a_failed_generation_is_an_error_and_not_a_wrong_answer(model, settings):
    class Broken(Server):
        def __call__(self, requests):
            return [*super().__call__(requests)[:-1], ServerError("gone")]

    with pytest.raises(ServerError, match="gone"):
        evaluate(model, Broken(ANSWERS), settings)
    with pytest.raises(ServerError, match="aborted"):
        evaluate(model, Server(ANSWERS, reason="abort"), settings)


def test_a_prompt_without_an_answer_is_refused(model, settings):
    path = Path(settings.prompts)
    path.write_text(path.read_text() + '\n{"id": "unknown", "prompt": "sum 1"}')
    with pytest.raises(DataError, match="1 prompts have no answer to judge by, first 'unknown'"):
        evaluate(model, Server(ANSWERS), settings)


def test_a_result_is_read_back_as_it_was_written(model, settings, tmp_path):
    for samples in (0, 2):
        result = result_of(model, replace(settings, samples=samples), ANSWERS)
        result.save(tmp_path / "evaluation" / "student.json")
        assert load_result(tmp_path / "evaluation" / "student.json") == result


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {"unknown": 1}}'])
def test_a_damaged_result_is_refused(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(DataError, match="expected a result of `tropd eval`"):
        load_result(tmp_path / "r.json")


def test_a_result_names_its_weights_and_prompts_by_content(model, settings, tmp_path):
    before = result_of(model, settings, ANSWERS)
    (model / "model.safetensors").write_bytes(b"other weights")
    after = result_of(model, settings, ANSWERS)
    assert before.weights_sha256 != after.weights_sha256 == weights_hash(model)
    assert before.prompts_sha256 == after.prompts_sha256


def test_the_difference_of_two_models_is_paired_by_prompt(model, settings):
    before = result_of(model, settings, ["3", "4", "0", "0", "0"])
    after = result_of(model, settings, ["3", "0", "7", "10", "12"])
    change = compare(before, after)
    assert change["difference"] == pytest.approx(0.4)
    assert (change["low"], change["high"]) == paired_difference_interval(before.greedy_correct, after.greedy_correct)


def test_results_of_other_settings_or_prompts_are_not_compared(model, settings):
    before = result_of(model, settings, ANSWERS)
    with pytest.raises(DataError, match="other settings"):
        compare(before, result_of(model, replace(settings, max_new_tokens=23), ANSWERS))
    path = Path(settings.prompts)
    path.write_text(path.read_text().replace("sum 4", "sum 3"))
    with pytest.raises(DataError, match="other settings"):
        compare(before, result_of(model, settings, ANSWERS))


def test_a_result_is_described_in_one_line(model, settings):
    line = describe(result_of(model, settings, ["3", "4", "8", "10", "12"]))
    assert "greedy 80.0% [37.6%, 96.4%] (4 of 5)" in line and "sampled (T=0.7) 40.0%" in line and "\n" not in line


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (3, 10), (10, 10), (101, 256), (1, 1)])
def test_the_wilson_interval_ends_where_the_score_test_just_accepts(correct, total):
    share = correct / total
    for edge in wilson_interval(correct, total):
        if edge in (pytest.approx(0.0, abs=1e-9), pytest.approx(1.0, abs=1e-9)):
            assert edge == pytest.approx(share)
        else:
            score = abs(share - edge) / math.sqrt(edge * (1 - edge) / total)
            assert score == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize("gain", [0.0, 0.3])
def test_the_paired_interval_covers_the_true_difference_about_95_times_in_100(gain):
    generator = np.random.default_rng(4)
    covered, trials = 0, 2000
    for _ in range(trials):
        before = generator.random(80) < 0.4
        after = before ^ (generator.random(80) < np.where(before, 0.1, 0.1 * 0.4 / 0.6 + gain / 0.6))
        low, high = paired_difference_interval(before.tolist(), after.tolist())
        covered += low <= gain <= high
    assert 0.935 <= covered / trials <= 0.985


def test_samples_of_one_prompt_widen_the_interval():
    """Two identical samples a prompt say no more than one."""
    one = clustered_interval([1.0, 0.0] * 20)
    pooled = wilson_interval(40, 80)
    assert one[1] - one[0] > 1.3 * (pooled[1] - pooled[0])
