"""Checks whether the group of verifier.pattern can ever capture a given answer.

This module does not check responses (`verify`). Invariant: the result is False only if no response can be right. A
pattern with a construct that is not analysed here (`_BEYOND`) counts as able to capture everything.
"""

from __future__ import annotations

import re
from functools import lru_cache

_BEYOND = re.compile(r"\\[1-9B]|\(\?P=|\(\?\(|\(\?[aiLmsux-]+:|\(\?<?[=!]|\(\?#")
"""Constructs that are not analysed: group references, conditions, flags for a part, look-arounds, comments."""
_AROUND = ("", " ", "\n")
"""White space that a match may have around the answer. The verifier strips it."""


def can_be_captured(pattern: str, answer: str) -> bool:
    """Return whether group 1 of `pattern`, taken alone, matches `answer` (stripped) with white space around it."""
    group = _first_group(pattern)
    if group is None:
        return True
    return any(group.fullmatch(before + answer + after) for before in _AROUND for after in _AROUND)


@lru_cache(maxsize=16)
def _first_group(pattern: str) -> re.Pattern[str] | None:
    """The content of the first capturing group, with the flags of the pattern; None if it cannot be used alone."""
    flags = re.compile(pattern).flags
    if _BEYOND.search(pattern) or flags & re.VERBOSE:
        return None
    start = depth = set_start = 0
    escaped = in_set = False
    for place, character in enumerate(pattern):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif in_set:
            # A closing bracket that comes first in a set is one of its characters.
            in_set = character != "]" or place == set_start
        elif character == "[":
            in_set, set_start = True, place + (2 if pattern[place + 1] == "^" else 1)
        elif character == "(" and start:
            depth += 1
        elif character == "(" and (pattern[place + 1] != "?" or pattern.startswith("(?P<", place)):
            start = place + 1 if pattern[place + 1] != "?" else pattern.index(">", place) + 1
        elif character == ")" and start and depth:
            depth -= 1
        elif character == ")" and start:
            return re.compile(pattern[start:place], flags)
    return None
