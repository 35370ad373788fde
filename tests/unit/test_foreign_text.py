"""Foreign text becomes one printable line, whatever it contains."""

from __future__ import annotations

import pytest

from tropd_mcore.foreign_text import one_line, quoted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words, ünïcode 世界", "plain words, ünïcode 世界"),
        ("two\r\nlines\tand\x0bmore\x85of\u2028them", "two lines and more of them"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("a\u202eb\u200bc\ufeff", r"a\u202eb\u200bc\ufeff"),
        ("\ud800", r"\ud800"),
        ("\x00\x7f\x9b31m", r"\x00\x7f\x9b31m"),
        (None, "None"),
        ("", ""),
    ],
)
def test_unprintable_characters_are_escaped_and_lines_joined(text: object, shown: str) -> None:
    assert one_line(text) == shown and one_line(text).isprintable()


@pytest.mark.parametrize("text", ["x" * 10**6, "\x1b" * 10**6, " " * 10**6 + "late"])
def test_the_length_is_bounded_after_the_escapes(text: str) -> None:
    assert len(one_line(text)) <= 300 and len(one_line(text, 7)) <= 7
    assert quoted("a\nb") == "'a b'"
