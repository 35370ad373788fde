"""The text that each token adds to a sequence, for displaying tokens one by one.

The text of a response is decoded as a whole instead (`chat.Renderer.decode`). Invariants: there is one text per token.
A character whose bytes are spread over several tokens belongs to the last of them. Bytes that are no character are
shown as U+FFFD and do not delay the following text. The texts of whole characters, joined, are the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tropd_mcore.data.tokenizer import decode

INCOMPLETE = "\ufffd"
"""The character that a decoder writes for bytes that are not (yet) a character."""
LONGEST_CHARACTER = 4
"""Largest number of bytes of a character in UTF-8, and so of tokens that it can be spread over."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each id adds; "" for all but the last token of a character of several tokens.

    The text depends on the token before, because SentencePiece decoders drop a space at the start of a text.
    """
    texts: list[str] = []
    waiting: list[int] = []  # tokens since the last sure boundary between two characters
    given = silent = 0  # characters of their text returned so far; tokens since then that returned none
    for place, index in enumerate(ids):
        alone = _added(tokenizer, ids[place - 1] if place else None, index)
        if INCOMPLETE not in alone:  # starts a new character: the waiting bytes can never become one
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
        elif silent == LONGEST_CHARACTER:  # the first of them is not part of a character; the others may be
            texts[-silent] = INCOMPLETE
            waiting, given, silent = waiting[1 - silent :], 0, silent - 1
    if waiting:
        texts[-1] += decode(tokenizer, waiting)[given:]
    return texts


def _added(tokenizer: Any, before: int | None, index: int) -> str:
    """The text of one token after another."""
    alone = decode(tokenizer, [index])
    if before is None or INCOMPLETE in alone:
        return alone
    first, both = decode(tokenizer, [before]), decode(tokenizer, [before, index])
    return both[len(first) :] if both.startswith(first) and len(both) >= len(first) + len(alone) else alone
