"""Turns foreign text (from a server, a log or a file) into one printable line for a message.

Our own texts do not need this. Invariant: the result of `one_line` has no line break, no terminal escape and no
character that changes the order or the look of the text around it. So nobody can write a second line into our log.
"""

LONGEST = 300
"""Most characters of foreign text in one message."""


def one_line(text: object, longest: int = LONGEST) -> str:
    """Return the words of `text` on one line, at most `longest` characters. Unprintable characters are escaped.

    `"\\x1b[2Jgone\\nerror: x"` becomes `"\\\\x1b[2Jgone error: x"`.
    """
    words = " ".join(str(text)[: 4 * longest].split())
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)
    return shown[:longest]


def quoted(text: object, longest: int = LONGEST) -> str:
    """Return `one_line` in quotes."""
    return f"'{one_line(text, longest)}'"
