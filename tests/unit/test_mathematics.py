r"""Right and wrong responses to answers as people write them: money, separators, units, words, intervals."""

import time

import math_verify
import pytest
from math_verify.errors import TimeoutException

from tropd_mcore.config.schema import VerifierConfig
from tropd_mcore.data import verify
from tropd_mcore.data.mathematics import _readable, equal
from tropd_mcore.data.verify import answer_problem, is_correct

MATH = VerifierConfig(kind="math_verify")

VERDICTS = (
    # money: an escaped dollar sign is no delimiter
    (r"\boxed{18}", r"\$18", True),
    (r"\boxed{\$18}", r"18", True),
    (r"\boxed{\$18.90}", r"\$18.90", True),
    (r"\boxed{18.9}", r"$\$18.90$", True),
    (r"\boxed{17}", r"\$18", False),
    (r"\boxed{\$1{,}234.50}", r"\$1,234.50", True),
    (r"\boxed{18\text{ dollars}}", r"\$18", True),
    (r"The total is \$18.", r"\$18", True),
    (r"The total is \$17.", r"\$18", False),
    (r"First \$5, then \$13, together $\$18$", r"\$18", True),
    (r"It costs $5 and she pays $20, so she gets $15", "15", True),
    (r"\boxed{\begin{pmatrix}1\\\$2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
    # a dollar sign at one end is money or a slip, not a pair of delimiters
    (r"\boxed{18}", "$18", True),
    (r"\boxed{18}", "18$", True),
    (r"\boxed{\frac{3}{4}}", r"$\frac{3}{4}", True),
    (r"\boxed{\frac{3}{5}}", r"$\frac{3}{4}", False),
    # delimiters
    (r"\boxed{\frac{3}{4}}", r"$\frac{3}{4}$", True),
    (r"\boxed{18}", r"$$18$$", True),
    (r"\boxed{18}", r"\(18\)", True),
    (r"\boxed{18}", r"\[18\]", True),
    (r"\boxed{18}", r"\boxed{18}", True),
    (r"\boxed{5}", r"The answer is $5$ dollars", True),
    (r"\boxed{6}", r"The answer is $5$ dollars", False),
    (r"\boxed{2, 3}", r"$x=2$ and $x=3$", True),
    # thousands
    (r"\boxed{1,234}", "1234", True),
    (r"\boxed{1,\!234}", "1234", True),
    (r"\boxed{1\,234}", "1234", True),
    (r"\boxed{1234567}", r"1\,234\,567", True),
    (r"\boxed{1234}", r"1{,}234", True),
    (r"\boxed{235}", r"1\,234", False),
    (r"\boxed{1, 234}", "1234", False),
    # percent and degrees: with or without the sign
    (r"\boxed{50}", r"50\%", True),
    (r"\boxed{50\%}", "50%", True),
    (r"\boxed{0.5}", r"50\%", True),
    (r"\boxed{5}", r"50\%", False),
    (r"\boxed{90}", r"90^\circ", True),
    # units are not compared
    (r"\boxed{3}", r"3\text{ cm}", True),
    (r"\boxed{3\,\mathrm{km}}", r"3\text{ cm}", True),
    (r"\boxed{5}", r"\$5\text{ million}", True),
    (r"\boxed{4\text{ cm}}", r"3\text{ cm}", False),
    # words
    (r"\boxed{\text{Paris}}", "Paris", True),
    (r"\boxed{Paris}", "Paris", True),
    (r"\boxed{\text{Paris}}", r"\text{Paris}", True),
    (r"\boxed{Pairs}", "Paris", False),
    (r"\boxed{\text{no solution}}", "no solution", True),
    (r"\boxed{\text{one solution}}", "no solution", False),
    (r"\boxed{B}", r"\text{(B)}", True),
    (r"\boxed{C}", r"\text{(B)}", False),
    # intervals, tuples, sets
    (r"\boxed{(1,2]}", "(1,2]", True),
    (r"\boxed{(1,2)}", "(1,2]", False),
    (r"\boxed{(2,1)}", "(1,2)", False),
    (r"\boxed{1,2}", "(1,2)", True),
    (r"\boxed{[0,\infty)}", r"[0,\infty)", True),
    (r"\boxed{x \in (1,2)}", "(1,2)", True),
    (r"\boxed{\{2,1\}}", r"\{1,2\}", True),
    # numbers in other forms
    (r"\boxed{\frac{7}{2}}", "3 1/2", True),
    (r"\boxed{3 1/2}", r"\frac{7}{2}", True),
    (r"\boxed{2}", "3 1/2", False),
    (r"\boxed{\frac{1}{3}}", r"0.\overline{3}", True),
    (r"\boxed{0.\overline{3}}", r"\frac{1}{3}", True),
    (r"\boxed{\frac{1}{6}}", r"0.1\overline{6}", True),
    (r"\boxed{\frac{19}{11}}", r"1.\overline{72}", True),
    (r"\boxed{0}", r"0.\overline{3}", False),
    (r"\boxed{100000}", "1e5", True),
    (r"\boxed{0.0015}", "1.5e-3", True),
    (r"\boxed{123}", "123_8", True),
    (r"\boxed{x=5}", "5", True),
    (r"\boxed{y=5}", "x=5", False),
    # what is left to identical text
    (r"\boxed{€5}", "€5", True),
    (r"\boxed{5}", "€5", False),
    # two boxes are two answers
    (r"\boxed{5} or \boxed{6}", "5", False),
)


@pytest.mark.parametrize(("response", "answer", "right"), VERDICTS)
def test_mathematically_equal_answers_are_judged_correct_and_others_wrong(response, answer, right, monkeypatch):
    monkeypatch.setattr(verify, "MATH_TIMEOUT_S", 300)  # a comparison takes milliseconds, but the machine may be busy
    assert is_correct(MATH, response, answer) is right
    assert answer_problem(MATH, answer) is None, "an answer that can be judged is not refused"


@pytest.mark.parametrize("answer", ["", " ", "$", "$$", r"\$", r"$\$$", r"\text{}", "$ $"])
def test_an_answer_without_mathematics_is_refused(answer, monkeypatch):
    monkeypatch.setattr(verify, "MATH_TIMEOUT_S", 300)
    problem = answer_problem(MATH, answer)
    assert problem is not None and "`answer`" in problem and "\n" not in problem


def test_an_answer_that_takes_too_long_to_read_is_refused(monkeypatch):
    """The library raises this at its time limit. Work that takes minutes on one machine may be quick on another."""
    limits = []

    def parse(text, *, parsing_timeout, **_):
        limits.append(parsing_timeout)
        raise TimeoutException("stopped")

    monkeypatch.setattr(verify, "MATH_TIMEOUT_S", 1)
    monkeypatch.setattr(math_verify, "parse", parse)
    problem = answer_problem(MATH, "x + 314159")
    assert problem is not None and "in 1 s" in problem and limits == [1]


def test_an_answer_that_once_took_too_long_to_read_is_read_again_later_and_not_logged_in_full(monkeypatch, caplog):
    """On an idle machine or with more time: only the first reading is stopped."""
    slow, times = TimeoutException("stopped"), []

    def parse(text, **options):
        times.append(text)
        if len(times) == 1:
            raise slow
        return real(text, **options)

    real = math_verify.parse
    monkeypatch.setattr(math_verify, "parse", parse)
    answer, response = "271828", r"\boxed{271828}" + " so it is" * 300
    assert not equal(response, answer, limit_s=300)
    assert equal(response, answer, limit_s=300)
    assert len(caplog.messages) == 1 and len(caplog.messages[0]) < 300
    times.append("the third call")
    assert equal(response, answer, limit_s=300) and times[4:] == [_readable(response)], "what was read is remembered"


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (r"\boxed{7}" + " and on and on" * 5000, True),
        ("on and on " * 5000 + r"\boxed{7}", True),
        (r"\boxed{7}" + " and on" * 5000 + r"\boxed{8}", False),
        ("it costs $3 or\n" * 3000 + "so she pays $4$ and then $7$", True),
        ("7 " + "x " * 20000, False),
    ],
    ids=["box at the start", "box at the end", "last box", "torn delimiters", "early expression"],
)
def test_only_the_last_box_or_the_end_of_a_long_response_is_read(response, right, monkeypatch):
    monkeypatch.setattr(verify, "MATH_TIMEOUT_S", 300)
    assert is_correct(MATH, response, "7") is right


def test_an_answer_that_is_a_whole_solution_is_refused():
    """No time limit ends a search of its regular expressions, which takes minutes for 100,000 digits."""
    assert "has 100000 characters; expected at most 2000" in answer_problem(MATH, "1" * 100_000)


@pytest.mark.parametrize("response", [r"0.%s\overline{3}", r"0.\overline{%s}", r"%s.\overline{3}", "%s"])
def test_a_response_that_repeats_a_digit_is_judged_wrong_in_linear_time_without_error(response):
    """Python prints no integer of more than 4300 digits. A rollout that repeats itself has more."""
    digits = "1" * 5000
    assert not is_correct(MATH, response % digits, "7")
    begin = time.monotonic()
    _readable(response % (digits * 20))
    assert time.monotonic() - begin < 5  # a quadratic search takes minutes
