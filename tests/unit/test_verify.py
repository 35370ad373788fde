"""Judging answers: the last match counts, mathematics is compared by value, and only a correct answer is correct."""

import threading

import pytest

from tropd_mcore.config.schema import VerifierConfig
from tropd_mcore.data import verify
from tropd_mcore.data.verify import is_correct

EXACT = VerifierConfig(kind="exact_match")
MATH = VerifierConfig(kind="math_verify")


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("7+5+0=12\n#### 12", True),
        ("#### 12  \n", True),
        ("#### 13\nno: #### 12", True),
        ("#### 12\nno: #### 13", False),
        ("12", False),
        ("", False),
        ("#### 12.", False),
        ("####\n12", True),
        ("#### 012", False),
    ],
)
def test_exact_match_compares_the_last_match_of_the_pattern(response, right):
    assert is_correct(EXACT, response, " 12 ") is right


def test_exact_match_uses_the_configured_pattern():
    verifier = VerifierConfig(kind="exact_match", pattern=r"<answer>(.*?)</answer>")
    assert is_correct(verifier, "<answer>1</answer> <answer>blue</answer>", "blue")
    assert not is_correct(verifier, "#### blue", "blue")


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"So the result is $\boxed{\frac{2}{4}}$.", r"\frac{1}{2}", True),
        (r"So the result is $\boxed{0.5}$.", "1/2", True),
        (r"$\boxed{2\sqrt{2}}$", r"\sqrt{8}", True),
        (r"$\boxed{3}$", r"3\pi", False),
        (r"$\boxed{3\pi}$", r"$3\pi$", True),
        (r"$\boxed{\frac{1}{3}}$", r"\frac{1}{2}", False),
        (r"$\boxed{x^2+2x+1}$", "(x+1)^2", True),
        ("I do not know.", "7", False),
        ("", "7", False),
        (r"$\boxed{\frac{1}{}$", "7", False),
    ],
)
def test_mathematical_answers_are_compared_by_value(response, answer, right, monkeypatch):
    monkeypatch.setattr(verify, "MATH_TIMEOUT_S", 300)  # a comparison takes milliseconds, but the machine may be busy
    assert is_correct(MATH, response, answer) is right


def test_an_answer_that_takes_too_long_to_compare_is_wrong(monkeypatch):
    monkeypatch.setattr(verify, "MATH_TIMEOUT_S", 1)
    assert is_correct(MATH, r"$\boxed{9^{9^{9^{9}}}}$", "2") is False  # without the bound, this would not end


def test_mathematics_can_be_judged_outside_the_main_thread():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(is_correct(MATH, r"$\boxed{\frac{1}{2}}$", "0.5")))
    thread.start()
    thread.join()
    assert verdicts == [True]
