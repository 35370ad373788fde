r"""Right and wrong responses to answers as people write them: money, separators, units, words, intervals."""

import pytest

from tropd_mcore.config.schema import VerifierConfig
from tropd_mcore.data import verify
from tropd_mcore.data.verify import answer_problem, judge

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
def test_an_answer_is_judged_as_people_mean_it(response, answer, right, monkeypatch):
    monkeypatch.setattr(verify, "MATH_TIMEOUT_S", 300)  # a comparison takes milliseconds, but the machine may be busy
    assert judge(MATH, response, answer) is right
    assert answer_problem(MATH, answer) is None, "an answer that can be judged is not refused"


@pytest.mark.parametrize("answer", ["", " ", "$", "$$", r"\$", r"$\$$", r"\text{}", "$ $"])
def test_an_answer_without_mathematics_is_refused(answer, monkeypatch):
    monkeypatch.setattr(verify, "MATH_TIMEOUT_S", 300)
    problem = answer_problem(MATH, answer)
    assert problem is not None and "`answer`" in problem and "\n" not in problem


def test_an_answer_that_takes_too_long_to_read_is_refused(monkeypatch):
    monkeypatch.setattr(verify, "MATH_TIMEOUT_S", 1)
    problem = answer_problem(MATH, "(" * 200 + "1" + ")" * 200)  # without the bound, this takes minutes
    assert problem is not None and "in 1 s" in problem


def test_an_answer_that_is_a_whole_solution_is_refused():
    """No time limit ends a search of its regular expressions, which takes minutes for 100,000 digits."""
    assert "has 100000 characters; expected at most 2000" in answer_problem(MATH, "1" * 100_000)
