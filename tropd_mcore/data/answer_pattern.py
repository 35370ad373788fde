"""Can the group of verifier.pattern ever hold an answer?

Not for judging (`verify`). Invariant: False is said only where no response can be right; a pattern that is beyond what
is looked at here (`_BEYOND`) can hold everything.
"""

from __future__ import annotations

import re
from functools import lru_cache

_BEYOND = re.compile(r"\\[1-9B]|\(\?P=|\(\?\(|\(\?[aiLmsux-]+:|\(\?<?[=!]|\(\?#")
"""References to groups, conditions, flags for a part of the pattern, looks at what stands around, comments."""
_AROUND = ("", " ", "\n")
"""White space that a match may hold before and after the answer, which judging strips off."""


def can_be_captured(pattern: str, answer: str) -> bool:
    """Return whether group 1 of `pattern`, taken alone, matches `answer` (stripped) with white space around it."""
    group = _first_group(pattern)
    if group is None:
        return True
    return any(group.fullmatch(before + answer + after) for before in _AROUND for after in _AROUND)


@lru_cache(maxsize=16)
def _first_group(pattern: str) -> re.Pattern[str] | None:
    """What stands in the first group that captures, with the flags of the whole; None where it cannot stand alone."""
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
            # A bracket that comes first in a set is one of its characters.
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
