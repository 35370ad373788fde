"""Judges the hints of a study's runs by what the other runs of the same student show.

A hint names objectives that would do better. It is right if one of them reached a higher sampled accuracy with the same
pair, seed and number of steps, and a false alarm otherwise. It is missed if a run of an objective that it does not name
got none, and one of the named was better by `MISSED`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tropd_mcore.study.plan import BEFORE
from tropd_mcore.study.result import CellResult

MISSED = 0.2
"""Difference of sampled accuracies above which a missing hint counts"""


@dataclass(frozen=True)
class Hint:
    """A kind of hint: words that it has, and the objective kinds that it names."""

    label: str
    words: str
    names: tuple[str, ...]


FIRST_STEP = Hint("at step 0: student and teacher disagree on most tokens", "at step 0", ("gkd", "sft"))
EVALUATION = Hint("of the evaluation: sampled answers lag behind greedy ones", "sampled accuracy is", ("opd", "gkd"))
HINTS = (FIRST_STEP, EVALUATION)


@dataclass(frozen=True)
class Judged:
    """One kind of hint over all runs of a study."""

    hint: Hint
    runs: int
    given: int
    right: int
    missed: int

    @property
    def false_alarms(self) -> int:
        return self.given - self.right


def judge(results: Sequence[CellResult]) -> list[Judged]:
    """Return the counts of each kind of hint. Runs whose student has no run with a named objective are left out."""
    judged = []
    for hint in HINTS:
        runs = given = right = missed = 0
        for result in results:
            others = [
                other.accuracy.sampled
                for other in results
                if (other.pair, other.seed, other.steps) == (result.pair, result.seed, result.steps)
                and other.cell != result.cell
                and kind(other) in hint.names
                and other.accuracy.sampled is not None
            ]
            if result.objective == BEFORE or result.accuracy.sampled is None or not others:
                continue
            runs += 1
            gain = max(others) - result.accuracy.sampled
            if any(hint.words in line for line in result.hints):
                given += 1
                right += gain > 0
            else:
                missed += gain > MISSED and kind(result) not in hint.names
        judged.append(Judged(hint, runs, given, right, missed))
    return judged


def kind(result: CellResult) -> str:
    """Return objective.kind of a run; "" if its settings do not name one."""
    found = [setting.partition("=")[2] for setting in result.settings if setting.startswith("objective.kind=")]
    return found[-1] if found and result.objective != BEFORE else ""
