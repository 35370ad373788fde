"""Is the answer of a response right?

Not a reward: it feeds metrics and evaluation. Invariant: a response without an answer is wrong, never an error.
"""

from __future__ import annotations

import re

from tropd_mcore.config.schema import VerifierConfig


def judge(verifier: VerifierConfig, response: str, answer: str) -> bool:
    """Return whether `response` ends in `answer`, as a string or as mathematics, as `verifier.kind` says."""
    assert verifier.kind != "none", "nothing is judged with verifier.kind=none"
    if verifier.kind == "exact_match":
        found = re.findall(verifier.pattern, response)
        return bool(found) and found[-1].strip() == answer.strip()
    from math_verify import parse
    from math_verify import verify as equal

    # Without a time limit of its own: the library's uses signals, which only the main thread may.
    return bool(equal(parse(answer, parsing_timeout=None), parse(response, parsing_timeout=None), timeout_seconds=None))
