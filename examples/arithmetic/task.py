"""The task: add two numbers column by column, with carries, and end with a line `#### answer`.

This module does not tokenize (see `tokenizer`) and does not judge answers (see `tropd_mcore.data.verify`). Invariants:
a problem has one worked answer. A problem is in at most one split, in whichever order its operands are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

QUESTIONS = ("What is {a} + {b}?", "Compute {a} + {b}.", "Add {a} and {b}.")
"""The forms of a question. Each has both operands once, in order."""


@dataclass(frozen=True)
class Problem:
    """A sum of two natural numbers, and the form of the question."""

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
        """Equal for problems with the same two operands."""
        return min(self.a, self.b), max(self.a, self.b)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class WorkedAnswer:
    """A worked answer with mistakes (slips).

    `written` is the text with the slips. `right` has, at each position, the right continuation of what was written
    before it. The two have the same length and differ only in digits.
    """

    written: str
    right: str


Place = Literal["operand", "carry", "tens", "units"]
Slip = Callable[[Place, int, int], int]
"""(place, right digit, sum of the previous column) -> the digit to write."""
Swap = Callable[[], bool]


@dataclass(frozen=True)
class Splits:
    """Training and held-out prompts; no sum is in both."""

    train: tuple[Problem, ...]
    heldout: tuple[Problem, ...]


def work(a: int, b: int, slip: Slip | None = None, swap: Swap | None = None) -> WorkedAnswer:
    """Add column by column, lowest first: one line `x+y+carry=sum` per column, sum in two digits, then `#### answer`.

    `swap` decides per line whether it is `y+x+carry=sum`, which is as right.

    After a slip the work continues from what is written. A wrong carry enters the sum of its line. A wrong sum gives
    the carry of the next line and a digit of the answer.
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
        first, second = (b, a) if swap is not None and swap() else (a, b)
        x = put("operand", first // 10**column % 10)
        put_text("+")
        y = put("operand", second // 10**column % 10)
        put_text("+")
        total = x + y + put("carry", before // 10)
        put_text("=")
        before = 10 * put("tens", total // 10) + put("units", total % 10)
        put_text("\n")
        answer = str(before if column == columns - 1 else before % 10) + answer
    put_text(f"#### {answer}")
    return WorkedAnswer("".join(written), "".join(right))


def work_without_carries(a: int, b: int) -> str:
    """Return the answer of another procedure: `x&y>z;` per column, highest first, z = (x + y) mod 10, then `#### zz..`.

    No carry is ever made, so the answer is wrong if any column needs one.
    """
    columns = max(len(str(a)), len(str(b)))
    steps, answer = "", ""
    for column in reversed(range(columns)):
        x, y = a // 10**column % 10, b // 10**column % 10
        steps += f"{x}&{y}>{(x + y) % 10};"
        answer += str((x + y) % 10)
    return f"{steps}#### {answer}"


def worked_answer(a: int, b: int) -> str:
    """Return the worked answer without slips."""
    return work(a, b).written


def random_slips(random: Random, rate: float) -> Slip:
    """Return slips at `rate` per digit. Carries and tens of a sum flip between 0 and 1; other digits become random."""

    def slip(place: Place, digit: int, before: int) -> int:
        if random.random() >= rate:
            return digit
        return 1 - digit if place in ("carry", "tens") else random.randint(0, 9)

    return slip


def forgotten_carries(random: Random, from_sum: int, probability: float) -> Slip:
    """Return slips that forget a carry with `probability` if the previous column's sum is at least `from_sum`."""

    def slip(place: Place, digit: int, before: int) -> int:
        forgets = place == "carry" and digit > 0 and before >= from_sum and random.random() < probability
        return 0 if forgets else digit

    return slip


def draw_problem(random: Random, min_digits: int, max_digits: int) -> Problem:
    """Draw a problem: for each operand, first a uniform number of digits, then a uniform number of that length."""

    def operand() -> int:
        digits = random.randint(min_digits, max_digits)
        return random.randint(10 ** (digits - 1), 10**digits - 1)

    return Problem(a=operand(), b=operand(), question=random.choice(QUESTIONS))


def make_splits(random: Random, *, min_digits: int, max_digits: int, train: int, heldout: int) -> Splits:
    """Draw `heldout` and then `train` problems, all with different pairs of operands."""
    seen: set[tuple[int, int]] = set()
    problems: list[Problem] = []
    while len(problems) < train + heldout:
        problem = draw_problem(random, min_digits, max_digits)
        if problem.key not in seen:
            seen.add(problem.key)
            problems.append(problem)
    return Splits(train=tuple(problems[heldout:]), heldout=tuple(problems[:heldout]))


def problem_stream(random: Random, *, min_digits: int, max_digits: int, exclude: Splits) -> Iterator[Problem]:
    """Yield problems for supervised training without end; none of them is held out."""
    held_out = {problem.key for problem in exclude.heldout}
    while True:
        problem = draw_problem(random, min_digits, max_digits)
        if problem.key not in held_out:
            yield problem
