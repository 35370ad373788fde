r"""Compares answers as mathematics with math_verify. Notations that the library misreads are rewritten first.

Responses without an answer are handled in `thinking`. Invariants: a dollar sign that means money (`\$`) is no
delimiter. Answer and response are rewritten by the same rules. LONGEST_RESPONSE characters of a response are read.
Parsing and comparison take a bounded time in the main thread; if they take longer, the two are not equal.
"""

from __future__ import annotations

import logging
import re
import threading
from functools import lru_cache
from typing import Any

log = logging.getLogger(__name__)

LONGEST_RESPONSE = 8000
"""Number of characters of a response that are read: its end, or from its last box on if that begins earlier."""

_MONEY = re.compile(r"(?<!\\)((?:\\\\)*)\\\$")
r"""`\$`, after whole pairs of backslashes (a line break of LaTeX)."""
_DELIMITED = re.compile(r"\$.+\$|\\\(.+\\\)|\\\[.+\\\]|\\boxed\b", re.DOTALL)
"""The delimiters by which math_verify finds mathematics."""
_WORDS = re.compile(r"(?=.*[A-Za-z]{4})[A-Za-z][A-Za-z '-]*")
"""A name or a statement. Without \\text, its letters would be read as the factors of a product, in any order."""
_NUMBER = re.compile(r"-?\d{1,30}(\.\d{1,30})?")
"""A number, which needs no trial (a trial takes milliseconds)."""
_REPEATING = re.compile(r"(?<!\d)(\d{0,30})\.(\d{0,30})\\(?:overline|bar|dot)\s*(?:\{\s*(\d{1,30})\s*\}|(\d))")
r"""`0.1\overline{6}`, which math_verify reads as 0.1 or not at all. The bounds keep the search linear and integers
printable."""
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

    The last LONGEST_RESPONSE characters of a response are read, and its last box wherever it is. Parsing and comparison
    may take `limit_s` seconds each; if one takes longer, the result is False. Units and words after a number are not
    compared, and 50% equals both 50 and 0.5, because math_verify reads them so.
    """
    from math_verify import verify

    limit = _limit(limit_s)
    try:
        expected, found = _parsed(answer, limit), _parse(_readable(_end(response)), limit)
    except _TooSlowError as error:
        log.warning("read as not equal to the answer %r: %s", answer[:60], error)
        return False
    return bool(verify(expected, found, timeout_seconds=limit))


def expression(response: str, *, limit_s: int) -> str | None:
    """Return the text of the expression found in a response; None if none can be read in `limit_s` seconds."""
    try:
        found = _parse(_readable(_end(response)), _limit(limit_s))
    except _TooSlowError:
        return None
    return str(found[-1]) if found else None


def can_be_equal(answer: str, *, limit_s: int) -> bool:
    """Return whether an expression can be read in `answer` and equals itself."""
    if _NUMBER.fullmatch(answer.strip()):
        return True
    from math_verify import verify

    limit = _limit(limit_s)
    try:
        expected = _parsed(answer, limit)
    except _TooSlowError:
        return False
    return bool(verify(expected, expected, timeout_seconds=limit))


@lru_cache(maxsize=1 << 16)
def _parsed(answer: str, limit: int | None) -> list[Any]:
    """The expressions in an answer; [] if there are none. Cached, because each sample of a prompt needs it.

    Raises _TooSlowError, which is not cached: on an idle machine, a later attempt may succeed.
    """
    text = _readable(answer).strip()
    if not _DELIMITED.search(text):
        # A bare answer would be read as plain text, and 3\pi as 3.
        text = text.strip("$ \t\n")
        text = rf"$\text{{{text}}}$" if _WORDS.fullmatch(text) else f"${text}$"
    return _parse(text, limit)


class _TooSlowError(Exception):
    """Reading a text took longer than the time limit."""


def _parse(text: str, limit: int | None) -> list[Any]:
    """The expressions that math_verify reads in `text`. Raises _TooSlowError; by itself the library would log the
    text."""
    from math_verify import parse
    from math_verify.errors import TimeoutException  # not a subclass of Exception

    try:
        found: list[Any] = parse(text, parsing_timeout=limit, raise_on_error=True)
    except TimeoutException as error:
        raise _TooSlowError(f"{len(text)} characters took more than {limit} s, the last are {text[-60:]!r}") from error
    except Exception:  # of many types, from sympy; each means that the library can read no mathematics here
        return []
    return found


def _end(response: str) -> str:
    """The part of a response that is read. If possible it starts at a line break, so it cuts no pair of delimiters."""
    begin, box = len(response) - LONGEST_RESPONSE, response.rfind(r"\boxed")
    if begin <= 0:
        return response
    if 0 <= box < begin:
        return response[box : box + LONGEST_RESPONSE]
    latest = box if box >= 0 else begin + LONGEST_RESPONSE // 2
    for mark in ("\n\n", "\n"):
        place = response.find(mark, begin, latest)
        if place >= 0:
            return response[place:]
    return response[begin:]


def _readable(text: str) -> str:
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return _REPEATING.sub(_as_fraction, text)


def _as_fraction(match: re.Match[str]) -> str:
    whole, fixed, period = match[1], match[2], match[3] or match[4]
    numerator = int(whole + fixed + period) - int((whole + fixed) or "0")
    return rf"\frac{{{numerator}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


def _limit(limit_s: int) -> int | None:
    """The time limit in the main thread, else None: it uses a signal, which only the main thread receives."""
    return limit_s if threading.current_thread() is threading.main_thread() else None
