"""The task: add two numbers column by column, carry included, and end with a line `#### answer`.

Not for ids (see `tokenizer`) or for judging answers (see `tropd_mcore.data.verify`). Invariants: one worked answer a
problem; a problem is in at most one split, whichever way round its operands are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

QUESTIONS = ("What is {a} + {b}?", "Compute {a} + {b}.", "Add {a} and {b}.")
"""The ways to ask; each names both operands once, in order."""


@dataclass(frozen=True)
class Problem:
    """A sum of two natural numbers and the way it is asked."""

    a: int
    b: int
    question: str
    """One of `QUESTIONS`."""

    @property
    def text(self) -> str:
        return self.question.format(a=self.a, b=self.b)

    @property
    def answer(self) -> str:
        return str(self.a + self.b)

    @property
    def key(self) -> tuple[int, int]:
        """The same for problems that ask for the same sum."""
        return min(self.a, self.b), max(self.a, self.b)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class WorkedAnswer:
    """A worked answer with slips: `written` as it stands, `right` what should have come after what is written so far.

    The two have the same length and differ in digits only.
    """

    written: str
    right: str


Place = Literal["operand", "carry", "tens", "units"]
Slip = Callable[[Place, int, int], int]
"""(place, right digit, sum of the column before) -> the digit that is written."""


@dataclass(frozen=True)
class Splits:
    """Training and held-out prompts; no sum is in both."""

    train: tuple[Problem, ...]
    heldout: tuple[Problem, ...]


def work(a: int, b: int, slip: Slip | None = None) -> WorkedAnswer:
    """Add column by column, lowest first: a line `x+y+carry=sum` each, the sum in two digits, then `#### answer`.

    After a slip the work goes on with what is written: a wrong carry gives the sum of that line, a wrong sum gives the
    carry of the next line and a digit of the answer.
    """
    columns = max(len(str(a)), len(str(b)))
    written: list[str] = []
    right: list[str] = []
    before = 0

    def put(place: Place, digit: int) -> int:
        chosen = digit if slip is None else slip(place, digit, before)
        written.append(str(chosen))
        right.append(str(digit))
        return chosen

    def put_text(text: str) -> None:
        written.append(text)
        right.append(text)

    answer = ""
    for column in range(columns):
        x = put("operand", a // 10**column % 10)
        put_text("+")
        y = put("operand", b // 10**column % 10)
        put_text("+")
        total = x + y + put("carry", before // 10)
        put_text("=")
        before = 10 * put("tens", total // 10) + put("units", total % 10)
        put_text("\n")
        answer = str(before if column == columns - 1 else before % 10) + answer
    put_text(f"#### {answer}")
    return WorkedAnswer("".join(written), "".join(right))


def worked_answer(a: int, b: int) -> str:
    """The worked answer without a slip."""
    return work(a, b).written


def random_slips(random: Random, rate: float) -> Slip:
    """Each digit is wrong at `rate`: a carry and the tens of a sum become the other of 0 and 1, the rest any digit."""

    def slip(place: Place, digit: int, before: int) -> int:
        if random.random() >= rate:
            return digit
        return 1 - digit if place in ("carry", "tens") else random.randint(0, 9)

    return slip


def forgotten_carries(random: Random, from_sum: int, probability: float) -> Slip:
    """A carry out of a column whose sum is at least `from_sum` is forgotten with `probability`."""

    def slip(place: Place, digit: int, before: int) -> int:
        forgets = place == "carry" and digit > 0 and before >= from_sum and random.random() < probability
        return 0 if forgets else digit

    return slip


def draw_problem(random: Random, min_digits: int, max_digits: int) -> Problem:
    """One random problem: the number of digits uniform for each operand, then the operand uniform among those."""

    def operand() -> int:
        digits = random.randint(min_digits, max_digits)
        return random.randint(10 ** (digits - 1), 10**digits - 1)

    return Problem(a=operand(), b=operand(), question=random.choice(QUESTIONS))


def make_splits(random: Random, *, min_digits: int, max_digits: int, train: int, heldout: int) -> Splits:
    """`heldout` and then `train` problems, all of different sums."""
    seen: set[tuple[int, int]] = set()
    problems: list[Problem] = []
    while len(problems) < train + heldout:
        problem = draw_problem(random, min_digits, max_digits)
        if problem.key not in seen:
            seen.add(problem.key)
            problems.append(problem)
    return Splits(train=tuple(problems[heldout:]), heldout=tuple(problems[:heldout]))


def problem_stream(random: Random, *, min_digits: int, max_digits: int, exclude: Splits) -> Iterator[Problem]:
    """Endless problems for supervised training, none of which is held out."""
    held_out = {problem.key for problem in exclude.heldout}
    while True:
        problem = draw_problem(random, min_digits, max_digits)
        if problem.key not in held_out:
            yield problem
