"""An answer that verifier.pattern can never capture is detected before the first response. In doubt it is accepted."""

import re

import pytest

from tropd_mcore.config.schema import VerifierConfig
from tropd_mcore.data.answer_pattern import can_be_captured
from tropd_mcore.data.verify import answer_problem, is_correct


@pytest.mark.parametrize(
    ("pattern", "response", "answer"),
    [
        (r"####\s*(.+)", "#### {}", "12"),
        (r"####\s*(.+)", "#### {}", "twelve pears (12)"),
        (r"(?s)<answer>(.*?)</answer>", "<answer>{}</answer>", "a\nb"),
        (r"(?i)answer: ([a-d])\b", "ANSWER: {}", "C"),
        (r"answer(?:s|): (?P<found>[^.]+)\.", "answers: {}.", "12"),
        (r"[(\[](\d+)[)\]]", "so [{}]", "12"),
        (r"[])](\d+)", "]{}", "12"),
        (r"[^])](\d+)", "x{}", "12"),
        (r"\((\d+)\)", "({})", "12"),
        (r"is( \d+)", "is {}", "12"),
        (r"((\d+)(/\d+)?) pears", "{} pears", "1/2"),
        (r"(?:(\d+)|none)", "{}", "12"),
        (r"(\d)(\d)?", "{}", "1"),
    ],
)
def test_an_answer_that_the_pattern_can_capture_is_never_refused(pattern, response, answer):
    """The oracle is a response that is judged correct."""
    verifier = VerifierConfig(kind="exact_match", pattern=pattern)
    assert is_correct(verifier, response.format(answer), answer)
    assert can_be_captured(pattern, answer) and answer_problem(verifier, f" {answer} ") is None


@pytest.mark.parametrize(
    ("pattern", "answer"),
    [
        (r"####\s*(.+)", "12\n13"),
        (r"<answer>(\d+)</answer>", "1/2"),
        (r"(?i)answer: ([a-d])\b", "E"),
        (r"answer: ([a-d])\b", "C"),
        (r"is ([^.]+)\.", "0.5"),
        (r"\boxed\{([^}]*)\}", r"\frac{1}{2}"),
        (r"(?:[(])(?P<found>\d+)", "x"),
    ],
)
def test_an_answer_that_the_pattern_can_never_capture_is_refused(pattern, answer):
    verifier = VerifierConfig(kind="exact_match", pattern=pattern)
    assert not can_be_captured(pattern, answer)
    problem = answer_problem(verifier, answer)
    assert problem is not None and f"verifier.pattern={pattern}" in problem and repr(answer) in problem


@pytest.mark.parametrize(
    "pattern",
    [r"(['\"])(\w)\1", r"(\d+(?= pears))", r"((?<=\$)\d+)", r"(?i:answer: )(\d)", r"(?x)(\d) # (", r"(a)(?(1)b)"],
)
def test_a_pattern_that_cannot_be_analysed_refuses_no_answer(pattern):
    re.compile(pattern)
    assert can_be_captured(pattern, "anything")


def test_an_empty_answer_is_refused_whatever_the_pattern():
    verifier = VerifierConfig(kind="exact_match", pattern="(.*)")
    assert "`answer` is empty" in answer_problem(verifier, " \n")


def test_the_first_group_of_a_pattern_is_the_answer_and_an_unmatched_group_gives_none():
    verifier = VerifierConfig(kind="exact_match", pattern=r"#### (?:(\d+)|(\w+))")
    assert is_correct(verifier, "#### 12", "12")
    assert not is_correct(verifier, "#### 12 #### none", "12")
