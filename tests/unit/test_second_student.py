"""The student with a wrong prior: its other procedure, its training examples, and the bounds that it must meet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import make_models
from examples.arithmetic.distance import Distance
from examples.arithmetic.settings import FULL, TINY, PretrainSettings
from examples.arithmetic.task import draw_problem, work_without_carries, worked_answer
from examples.arithmetic.tokenizer import train_tokenizer

pytest.importorskip("transformers")
from examples.arithmetic import models  # (imports transformers)

OPERANDS = st.integers(min_value=0, max_value=99999)
BRIEF = PretrainSettings(max_steps=2, learning_rate=1e-3)
OTHER = replace(BRIEF, other_share=1.0, continued_share=0.3, relapse_share=0.3)
MICRO = replace(
    TINY,
    train_prompts=5,
    heldout_prompts=3,
    tokenizer_texts=200,
    teacher_training=BRIEF,
    student_training=BRIEF,
    misled_training=(BRIEF, OTHER),
)
GOOD = Distance(total_variation=0.9, forward_kl=0.8, right_alone=0.1, right_after_first_line=0.95)


@given(OPERANDS, OPERANDS)
def test_the_other_procedure_is_right_exactly_where_no_column_has_a_carry(a: int, b: int) -> None:
    answer = work_without_carries(a, b).rpartition("#### ")[2]
    columns = range(max(len(str(a)), len(str(b))))
    carries = any(a // 10**column % 10 + b // 10**column % 10 > 9 for column in columns)
    assert (int(answer) == a + b) == (not carries)


def test_examples_of_the_other_procedure_begin_like_the_worked_answer_only_where_nothing_is_learnt() -> None:
    random = Random(5)
    problems = [draw_problem(random, 3, 4) for _ in range(300)]
    tokenizer = train_tokenizer(
        [worked_answer(p.a, p.b) for p in problems] + [p.text for p in problems] + ["system\nuser\nassistant\n"],
        max_positions=512,
    )
    draw = models._example_drawer(tokenizer, OTHER, Random(6))
    seen = {"other": 0, "continued": 0, "relapse": 0}
    for problem in problems:
        example = draw(problem)
        worked = models.encode_problem(tokenizer, problem).response_ids
        other = models.encode_other(tokenizer, problem).response_ids
        line = models.first_line(tokenizer, problem)
        given = example.label_ids.count(models.IGNORED_LABEL)
        assert example.label_ids[:given] == [models.IGNORED_LABEL] * given
        assert example.label_ids[given:] == example.response_ids[given:]
        if given == 0:
            seen["other"] += 1
            assert example.response_ids == other
        elif example.response_ids == worked:
            seen["continued"] += 1
            assert given == len(line)
        else:
            seen["relapse"] += 1
            assert 0 < given < len(line)
            assert example.response_ids == [*line[:given], *other]
    assert all(count > 50 for count in seen.values()), seen


def test_a_student_within_the_bounds_has_no_problems() -> None:
    assert GOOD.problems() == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"total_variation": 0.79}, "total variation is 0.790, expected >= 0.8"),
        ({"forward_kl": 0.49}, "forward KL is 0.490, expected >= 0.5"),
        ({"right_alone": 0.41}, "right alone is 0.410, expected <= 0.4"),
        ({"right_after_first_line": 0.89}, "right after the first line is 0.890, expected >= 0.9"),
        ({"forward_kl": float("nan")}, "forward KL is nan, expected >= 0.5"),
    ],
)
def test_a_student_outside_a_bound_is_named(change: dict[str, float], line: str) -> None:
    assert replace(GOOD, **change).problems() == [line]


def test_a_student_that_is_no_example_of_a_wrong_prior_is_refused_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_models, "TINY", MICRO)
    assert make_models.main([str(tmp_path / "example"), "--tiny"]) == 2
    assert "error: misled: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_quickstart_has_both_students_and_the_small_example_has_one() -> None:
    assert len(FULL.misled_training) == 2
    assert TINY.misled_training == ()
