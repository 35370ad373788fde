r"""Answers compared as mathematics, by math_verify; what that library reads wrongly is rewritten before it sees it.

Not for responses without an answer (`thinking`). Invariants: a dollar sign that is money (`\$`) is no delimiter; answer
and response are rewritten by the same rules; parsing and comparing take a bounded time in the main thread.
"""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from typing import Any

_MONEY = re.compile(r"(?<!\\)((?:\\\\)*)\\\$")
r"""`\$`, after whole pairs of backslashes (a line break of LaTeX)."""
_DELIMITED = re.compile(r"\$.+\$|\\\(.+\\\)|\\\[.+\\\]|\\boxed\b", re.DOTALL)
"""What math_verify finds mathematics by."""
_WORDS = re.compile(r"(?=.*[A-Za-z]{4})[A-Za-z][A-Za-z '-]*")
"""A name or a statement; left alone, its letters would be the factors of a product, in any order."""
_NUMBER = re.compile(r"-?\d{1,30}(\.\d{1,30})?")
"""Needs no trial, which takes milliseconds."""
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))")
r"""`0.1\overline{6}`; math_verify reads 0.1, or nothing."""
_REWRITTEN = (
    (_MONEY, r"\1"),
    # 1\,234 and 12\ 345\,678: digits in groups of three; math_verify reads 1 + 234.
    (re.compile(r"(?<=\d)\\[,; ](?=\d{3}(?!\d))"), ""),
    # 3 1/2: a mixed number; math_verify reads (3 + 1) / 2.
    (re.compile(r"(?<![\w./,])(\d+) +(\d+)/(\d+)(?![\w/])"), r"\1\\frac{\2}{\3}"),
    # 1.5e-3: a power of ten; math_verify reads Euler's number.
    (re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)"), r"\1 \\times 10^{\2}"),
)


def equal(response: str, answer: str, *, limit_s: int) -> bool:
    """Return whether the last expression in `response` equals `answer`, LaTeX with or without its delimiters.

    Parsing and comparison may take `limit_s` seconds each; what takes longer is not equal. Units and words after a
    number are not compared, and 50% equals both 50 and 0.5: that is how math_verify reads them.
    """
    from math_verify import parse, verify

    limit = _limit(limit_s)
    found = parse(_readable(response), parsing_timeout=limit)
    return bool(verify(_parsed(answer, limit), found, timeout_seconds=limit))


def can_be_equal(answer: str, *, limit_s: int) -> bool:
    """Return whether an expression can be read in `answer`, and equals itself."""
    if _NUMBER.fullmatch(answer.strip()):
        return True
    from math_verify import verify

    limit = _limit(limit_s)
    expected = _parsed(answer, limit)
    return bool(verify(expected, expected, timeout_seconds=limit))


@lru_cache(maxsize=1 << 16)
def _parsed(answer: str, limit: int | None) -> list[Any]:
    """What can be read in an answer; [] where that is nothing. Each of the samples of a prompt asks for it."""
    from math_verify import parse

    text = _readable(answer).strip()
    if not _DELIMITED.search(text):
        # A bare answer would be read as plain text, and 3\pi as 3.
        text = text.strip("$ \t\n")
        text = rf"$\text{{{text}}}$" if _WORDS.fullmatch(text) else f"${text}$"
    found: list[Any] = parse(text, parsing_timeout=limit)
    return found


def _readable(text: str) -> str:
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return _REPEATING.sub(_as_fraction, text)


def _as_fraction(match: re.Match[str]) -> str:
    whole, fixed, period = match[1], match[2], match[3] or match[4]
    numerator = int(whole + fixed + period) - int((whole + fixed) or "0")
    return rf"\frac{{{numerator}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


def _limit(limit_s: int) -> int | None:
    """The time limit is a signal, which only the main thread can receive."""
    return limit_s if threading.current_thread() is threading.main_thread() else None
