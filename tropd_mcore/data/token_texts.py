"""What each token of a sequence adds to its text, for showing tokens one by one.

Not for the text of a response, which is decoded as a whole (`chat.Renderer.decode`). Invariants: there is one text per
token; a character whose bytes are spread over several tokens belongs to the last of them; bytes that are no character
show as U+FFFD and do not delay what follows them; together, the texts of whole characters are the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tropd_mcore.data.tokenizer import decode

INCOMPLETE = "\ufffd"
"""What a decoder writes for bytes that are no character (yet)."""
LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, so the most tokens that one character can be spread over."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each id adds; "" for the first tokens of a character of several tokens.

    The text depends on the token before: decoders of SentencePiece drop a space at the start of what they decode.
    """
    texts: list[str] = []
    waiting: list[int] = []  # tokens since the last place that is surely between two characters
    given = silent = 0  # characters of their text that have been given out; tokens that have given none since
    for place, index in enumerate(ids):
        alone = _added(tokenizer, ids[place - 1] if place else None, index)
        if INCOMPLETE not in alone:  # begins at the start of a character: what waits can never become one
            if waiting:
                texts[-1] += decode(tokenizer, waiting)[given:]
            texts.append(alone)
            waiting, given, silent = [], 0, 0
            continue
        waiting.append(index)
        text = decode(tokenizer, waiting)
        whole = text.rstrip(INCOMPLETE)
        silent = 0 if len(whole) > given else silent + 1
        texts.append(whole[given:])
        given = max(given, len(whole))
        if whole == text:
            waiting, given, silent = [], 0, 0
        elif silent == LONGEST_CHARACTER:  # the first of them is no part of a character, the others may be
            texts[-silent] = INCOMPLETE
            waiting, given, silent = waiting[1 - silent :], 0, silent - 1
    if waiting:
        texts[-1] += decode(tokenizer, waiting)[given:]
    return texts


def _added(tokenizer: Any, before: int | None, index: int) -> str:
    """The text of one token behind another."""
    alone = decode(tokenizer, [index])
    if before is None or INCOMPLETE in alone:
        return alone
    first, both = decode(tokenizer, [before]), decode(tokenizer, [before, index])
    return both[len(first) :] if both.startswith(first) and len(both) >= len(first) + len(alone) else alone
