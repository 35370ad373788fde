"""Is the answer of a response right?

It feeds metrics, evaluation, and the objectives that learn from a verifier. Invariant: a response without an answer is
wrong, never an error.
"""

from __future__ import annotations

import re
import threading

from tropd_mcore.config.schema import VerifierConfig

MATH_TIMEOUT_S = 5
"""Longest parsing and longest comparison of one answer; what takes longer is wrong."""


def judge(verifier: VerifierConfig, response: str, answer: str) -> bool:
    """Return whether `response` ends in `answer`, as a string or as mathematics, as `verifier.kind` says."""
    assert verifier.kind != "none", "nothing is judged with verifier.kind=none"
    if verifier.kind == "exact_match":
        found = re.findall(verifier.pattern, response)
        return bool(found) and found[-1].strip() == answer.strip()
    return _equal_as_mathematics(response, answer)


def _equal_as_mathematics(response: str, answer: str) -> bool:
    """Compare the last expression in `response` with `answer`, which is LaTeX with or without its dollar signs."""
    from math_verify import parse, verify

    # A bare answer would be read as plain text, and 3\pi as 3.
    expected = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    # The time limit is a signal, which only the main thread can receive.
    limit = MATH_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    return bool(
        verify(parse(expected, parsing_timeout=limit), parse(response, parsing_timeout=limit), timeout_seconds=limit)
    )
