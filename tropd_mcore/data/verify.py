"""Checks whether the answer of a response is correct.

The result is used by metrics, evaluation, and objectives that learn from a verifier. Mathematics is compared in
`mathematics`; patterns are analysed in `answer_pattern`. Invariants: a response without an answer is wrong, never an
error. An answer that no response can have is found by `answer_problem` when it is read.
"""

from __future__ import annotations

import re

from tropd_mcore.config.schema import VerifierConfig
from tropd_mcore.data.answer_pattern import can_be_captured
from tropd_mcore.data.mathematics import can_be_equal, equal, expression
from tropd_mcore.data.thinking import answer_part

MATH_TIMEOUT_S = 5
"""Time limit for parsing and for comparing one answer. An answer that takes longer is wrong."""
LONGEST_MATH_ANSWER = 2000
"""Largest number of characters of a mathematical answer. Searching it with regular expressions takes quadratic time,
which no time limit can end."""


def is_correct(
    verifier: VerifierConfig, response: str, answer: str, *, finished: bool = True, opened: bool = False
) -> bool:
    """Return whether `response` ends in `answer`, as a string or as mathematics, as `verifier.kind` says.

    `finished`: the response ended by itself, not at its token budget. `opened`: its prompt opened a thinking block.
    """
    said = answer_part(verifier, response, finished=finished, opened=opened)
    return said is not None and is_right(verifier, said, answer)


def is_right(verifier: VerifierConfig, said: str, answer: str) -> bool:
    """Return whether `said`, the text outside thinking blocks, ends in `answer`."""
    assert verifier.kind != "none", "nothing is judged with verifier.kind=none"
    if verifier.kind == "exact_match":
        found = found_answer(verifier, said)
        return found is not None and found == answer.strip()
    return equal(said, answer, limit_s=MATH_TIMEOUT_S)


def found_answer(verifier: VerifierConfig, said: str) -> str | None:
    """Return the answer found in `said`, the text outside thinking blocks, for display; None if there is none."""
    if verifier.kind == "exact_match":
        found = [match[1] for match in re.finditer(verifier.pattern, said)]
        return found[-1].strip() if found and found[-1] is not None else None
    return expression(said, limit_s=MATH_TIMEOUT_S)


def answer_problem(verifier: VerifierConfig, answer: str) -> str | None:
    """Return why no response can be right; None if one can, or if that is unknown."""
    assert verifier.kind != "none", "nothing is judged with verifier.kind=none"
    if not answer.strip():
        return "`answer` is empty; write it, or leave it out if nothing is to be judged"
    if verifier.kind == "exact_match":
        if can_be_captured(verifier.pattern, answer.strip()):
            return None
        return (
            f"no response can have the `answer` {answer[:60]!r}: verifier.pattern={verifier.pattern} never captures it"
        )
    if len(answer) > LONGEST_MATH_ANSWER:
        return f"the `answer` has {len(answer)} characters; expected at most {LONGEST_MATH_ANSWER}, the result alone"
    if not can_be_equal(answer, limit_s=MATH_TIMEOUT_S):
        return (
            f"no response can have the `answer` {answer[:60]!r}: math_verify finds no mathematics in it "
            f"in {MATH_TIMEOUT_S} s; write it as LaTeX (words as \\text{{...}})"
        )
    return None
