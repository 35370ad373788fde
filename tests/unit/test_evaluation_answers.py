"""What `tropd eval` keeps of each answer, pass@k, and the paired difference of sampled accuracies."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from tests.unit.test_evaluation import ANSWERS, Server, model, result_of, settings
from tropd_mcore.evaluation.evaluate import (
    EvaluationSettings,
    answers_file,
    compare,
    describe,
    evaluate,
    load_result,
)
from tropd_mcore.evaluation.statistics import paired_mean_interval, pass_at

__all__ = ["model", "settings"]  # fixtures


def test_every_answer_is_kept_with_its_text_verdict_and_reason(
    model: Path, settings: EvaluationSettings, tmp_path: Path
) -> None:
    path = tmp_path / "evaluation_after.json"
    result = result_of(model, settings, ["3", "5", "7", "10", "12"])
    result.save(path)
    assert answers_file(path) == tmp_path / "evaluation_after.answers.jsonl"
    lines = [json.loads(line) for line in answers_file(path).read_text().splitlines()]
    assert len(lines) == 5 + 10
    assert [line["sample"] for line in lines] == [None] * 5 + [0, 1] * 5
    assert lines[0]["id"] == "p0" and lines[0]["right"] and lines[0]["found"] == "3"
    assert lines[1] | {"text": ""} == {
        "id": "p1", "sample": None, "text": "", "finish_reason": "stop", "found": "5", "expected": "4", "right": False,
    }  # fmt: skip
    assert "#### 5" in lines[1]["text"]
    for line in lines:
        assert line["right"] == (line["found"] == line["expected"])
    assert sum(line["right"] for line in lines if line["sample"] is None) == result.greedy.correct
    assert sum(line["right"] for line in lines if line["sample"] is not None) == sum(result.sampled_correct)
    assert load_result(path) == result and load_result(path).answers == []


def test_a_cut_answer_is_kept_without_a_found_answer(model: Path, settings: EvaluationSettings) -> None:
    from datetime import date

    result = evaluate(model, Server(ANSWERS, reason="length"), settings, today=date(2024, 2, 29))
    assert {(answer.finish_reason, answer.found, answer.right) for answer in result.answers} == {
        ("length", None, False)
    }


def test_pass_at_k_equals_the_average_over_all_choices_of_k_answers() -> None:
    correct, samples = [0, 1, 3, 5], 5
    for k in range(1, samples + 1):
        drawn = [
            np.mean([any(choice) for choice in combinations([True] * right + [False] * (samples - right), k)])
            for right in correct
        ]
        assert pass_at(k, correct, samples) == pytest.approx(np.mean(drawn), abs=1e-12)
    assert pass_at(1, correct, samples) == pytest.approx(sum(correct) / (samples * len(correct)))


def test_pass_at_k_and_the_sampled_difference_are_part_of_a_result(model: Path, settings: EvaluationSettings) -> None:
    weak = result_of(model, settings, ["3", "5", "5", "5", "5"])
    strong = result_of(model, settings, ANSWERS)
    assert strong.pass_at == pytest.approx({"1": 0.5, "2": 1.0}) and weak.pass_at == pytest.approx({"1": 0.1, "2": 0.2})
    assert "pass@2 100.0%" in describe(strong)
    change = compare(weak, strong)
    assert change["sampled_difference"] == pytest.approx(0.4)
    assert change["sampled_low"] < 0.4 < change["sampled_high"]


def test_the_interval_of_paired_means_covers_the_true_difference_about_95_times_in_100() -> None:
    generator, covered = np.random.default_rng(7), 0
    for _ in range(400):
        skill = generator.random(200)
        before = generator.binomial(4, 0.5 * skill) / 4
        after = generator.binomial(4, np.minimum(1, 0.5 * skill + 0.1)) / 4
        low, high = paired_mean_interval(before.tolist(), after.tolist())
        covered += low <= 0.1 <= high
    assert 360 <= covered <= 396
