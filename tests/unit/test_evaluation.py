"""Evaluating a model: the requests, the verdicts, and the coverage of the intervals."""

import json
import math
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_models import tiny_tokenizer, write_tiny_model
from tropd_mcore.cli.eval_command import _stored
from tropd_mcore.data.chat import Renderer
from tropd_mcore.errors import DataError, ServerError
from tropd_mcore.evaluation.evaluate import (
    EvaluationResult,
    EvaluationSettings,
    compare,
    describe,
    evaluate,
    load_result,
)
from tropd_mcore.evaluation.statistics import clustered_interval, paired_difference_interval, wilson_interval
from tropd_mcore.serving.wire import Generation, GenerationRequest
from tropd_mcore.weights.digest import folder_digest

ANSWERS = ["3", "4", "7", "10", "12"]
TODAY = date(2024, 2, 29)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, num_hidden_layers=1)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def settings(tmp_path) -> EvaluationSettings:
    lines = [json.dumps({"id": f"p{i}", "prompt": f"sum {i}", "answer": a}) for i, a in enumerate(ANSWERS)]
    path = tmp_path / "heldout.jsonl"
    path.write_text("\n".join(lines))
    return EvaluationSettings(prompts=str(path), max_new_tokens=24, samples=2, temperature=0.7, top_p=0.9)


class Server:
    """Answers the prompt `sum <i>` with `#### <texts[i]>`. The second sample of a prompt is always wrong."""

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
    return evaluate(model, Server(texts), settings, today=TODAY)


def test_greedy_evaluation_requests_each_prompt_once_at_temperature_0_and_sampling_as_configured(model, settings):
    server = Server(ANSWERS)
    evaluate(model, server, settings, today=TODAY)
    greedy, sampled = server.calls
    assert len(greedy) == 5 and {(r.temperature, r.top_p) for r in greedy} == {(0.0, 1.0)}
    assert len(sampled) == 10 and {(r.temperature, r.top_p) for r in sampled} == {(0.7, 0.9)}
    renderer = Renderer(model)
    for index, request in enumerate(greedy):
        assert request.input_ids.tolist() == renderer.prompt_ids(f"sum {index}").tolist()
        assert request.max_new_tokens == 24 and request.stop_token_ids == renderer.eos_ids


def test_correct_answers_are_counted_by_prompt_and_by_sample(model, settings):
    result = result_of(model, settings, ["3", "4", "8", "10", "nothing"])
    assert result.greedy_correct == [True, True, False, True, False]
    assert (result.greedy.correct, result.greedy.total, result.greedy.accuracy) == (3, 5, 0.6)
    assert (result.greedy.low, result.greedy.high) == wilson_interval(3, 5)
    assert (result.sampled.correct, result.sampled.total, result.sampled.accuracy) == (3, 10, 0.3)
    assert (result.sampled.low, result.sampled.high) == clustered_interval([0.5, 0.5, 0.0, 0.5, 0.0])


def test_lengths_include_the_end_token_and_truncation_is_the_servers_finish_reason(model, settings):
    tokenizer = tiny_tokenizer()
    expected = np.mean([len(tokenizer.encode(f"#### {answer}")) + 1 for answer in ANSWERS])
    assert result_of(model, settings, ANSWERS).mean_length == pytest.approx(expected)
    assert result_of(model, settings, ANSWERS).truncated == 0.0
    cut = evaluate(model, Server(ANSWERS, reason="length"), settings, today=TODAY)
    assert cut.truncated == 1.0


def test_without_samples_only_greedy_answers_are_requested(model, settings):
    server = Server(ANSWERS)
    result = evaluate(model, server, replace(settings, samples=0, limit=2), today=TODAY)
    assert [len(call) for call in server.calls] == [2] and result.sampled is None and result.greedy.total == 2


def test_a_failed_generation_is_an_error_and_not_a_wrong_answer(model, settings):
    class Broken(Server):
        def __call__(self, requests):
            return [*super().__call__(requests)[:-1], ServerError("gone")]

    with pytest.raises(ServerError, match="gone"):
        evaluate(model, Broken(ANSWERS), settings, today=TODAY)
    with pytest.raises(ServerError, match="aborted"):
        evaluate(model, Server(ANSWERS, reason="abort"), settings, today=TODAY)


def test_a_prompt_without_an_answer_is_refused(model, settings):
    path = Path(settings.prompts)
    path.write_text(path.read_text() + '\n{"id": "unknown", "prompt": "sum 1"}')
    with pytest.raises(DataError, match=r"heldout\.jsonl:6: prompt 'unknown' has no `answer`, but `tropd eval` judges"):
        evaluate(model, Server(ANSWERS), settings, today=TODAY)
    assert evaluate(model, Server(ANSWERS), replace(settings, limit=5), today=TODAY).greedy.correct == 5


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


def test_truncated_or_unfinished_thinking_answers_count_as_wrong_unless_configured_otherwise(model, settings):
    cut = evaluate(model, Server(ANSWERS, reason="length"), settings, today=TODAY)
    assert cut.greedy.correct == 0 and cut.sampled.correct == 0
    lenient = replace(settings, unfinished="judge")
    assert evaluate(model, Server(ANSWERS, reason="length"), lenient, today=TODAY).greedy.correct == 5
    thinking = ["3</think> no", "<think>", "7", "</think>#### 10", "12 <think>"]
    assert result_of(model, settings, thinking).greedy_correct == [False, False, True, True, False]


def test_a_result_that_does_not_say_how_it_was_judged_is_refused(model, settings, tmp_path):
    values = asdict(result_of(model, settings, ANSWERS))
    del values["settings"]["unfinished"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"expected a result of `tropd eval`: KeyError\('settings.unfinished'\)"):
        load_result(path)


def test_the_prompts_are_rendered_with_the_date_and_the_variables_of_the_settings(tmp_path, settings):
    template = "{{ strftime_now('%d %b %Y') }}{% if loud %}!{% endif %} {{ messages[0]['content'] }} "
    folder = write_tiny_model(tmp_path / "dated", num_hidden_layers=1)
    (folder / "chat_template.jinja").write_text(template)
    lines = [json.dumps({"id": "a", "messages": [{"role": "user", "content": "sum"}], "answer": "3"})]
    Path(settings.prompts).write_text("\n".join(lines))
    asked = []

    def generate(requests):
        asked.extend(tiny_tokenizer().decode(request.input_ids.tolist()) for request in requests)
        return [Generation(np.array([5], np.int32), np.zeros(1, np.float32), "length", ("default",))] * len(requests)

    greedy = replace(settings, samples=0, chat_template_kwargs={"loud": True})
    one = evaluate(folder, generate, greedy, today=TODAY)
    other = evaluate(folder, generate, greedy, today=date(2024, 3, 1))
    fixed = evaluate(folder, generate, replace(greedy, template_date="2024-02-29"), today=date(2024, 3, 1))
    assert asked == ["29 Feb 2024! sum ", "01 Mar 2024! sum ", "29 Feb 2024! sum "]
    assert (one.template_date, fixed.template_date) == ("2024-02-29", "2024-02-29")
    with pytest.raises(DataError, match=r"print different dates \(2024-02-29 and 2024-03-01\)"):
        compare(one, other)


def test_a_result_names_its_weights_and_prompts_by_content(model, settings, tmp_path):
    before = result_of(model, settings, ANSWERS)
    (model / "model.safetensors").write_bytes(b"other weights")
    after = result_of(model, settings, ANSWERS)
    assert before.weights_sha256 != after.weights_sha256 == folder_digest(model).weights()
    assert before.prompts_sha256 == after.prompts_sha256


def test_a_stored_result_is_reused_only_for_the_same_model_prompts_and_settings(settings, tmp_path):
    model = write_tiny_model(tmp_path / "model", num_hidden_layers=1)
    result = result_of(model, settings, ANSWERS)
    result.save(tmp_path / "result.json")
    assert _stored(tmp_path / "result.json", model, settings, TODAY) == result
    assert _stored(tmp_path / "result.json", model, replace(settings, top_p=1.0), TODAY) is None
    files = ("model.safetensors", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for file in (Path(settings.prompts), *(model / name for name in files)):
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        assert _stored(tmp_path / "result.json", model, settings, TODAY) is None, file
        file.write_bytes(content)
    assert _stored(tmp_path / "result.json", model, settings, TODAY) == result
    Path(settings.prompts).unlink()
    with pytest.raises(DataError, match="--prompts=.* cannot be read"):
        _stored(tmp_path / "result.json", model, settings, TODAY)


def test_the_difference_of_two_models_is_paired_by_prompt(model, settings):
    before = result_of(model, settings, ["3", "4", "0", "0", "0"])
    after = result_of(model, settings, ["3", "0", "7", "10", "12"])
    change = compare(before, after)
    assert change["difference"] == pytest.approx(0.4)
    assert (change["low"], change["high"]) == paired_difference_interval(before.greedy_correct, after.greedy_correct)


def test_results_of_other_settings_or_prompts_are_not_compared(model, settings):
    before = result_of(model, settings, ANSWERS)
    with pytest.raises(DataError, match="different settings"):
        compare(before, result_of(model, replace(settings, max_new_tokens=23), ANSWERS))
    path = Path(settings.prompts)
    path.write_text(path.read_text().replace("sum 4", "sum 3"))
    with pytest.raises(DataError, match="different settings"):
        compare(before, result_of(model, settings, ANSWERS))


def test_a_result_is_described_in_one_line(model, settings):
    line = describe(result_of(model, settings, ["3", "4", "8", "10", "12"]))
    assert "greedy 80.0% [37.6%, 96.4%] (4 of 5)" in line and "sampled (T=0.7) 40.0%" in line and "\n" not in line


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (3, 10), (10, 10), (101, 256), (1, 1)])
def test_the_wilson_interval_ends_at_the_limits_of_the_score_test(correct, total):
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
    """Two identical samples per prompt carry no more information than one."""
    one = clustered_interval([1.0, 0.0] * 20)
    pooled = wilson_interval(40, 80)
    assert one[1] - one[0] > 1.3 * (pooled[1] - pooled[0])
