"""Text that somebody else wrote (a server, a log, a file) as one printable line of a message.

Not for our own words. Invariant: what `one_line` returns holds no line break, no terminal escape and no character that
changes the order or the look of what stands around it, so nobody can write a second line into our log.
"""

LONGEST = 300
"""Characters of foreign text in one message."""


def one_line(text: object, longest: int = LONGEST) -> str:
    """Return the words of `text` on one line, at most `longest` characters; what is not printable is escaped.

    `"\\x1b[2Jgone\\nerror: x"` becomes `"\\\\x1b[2Jgone error: x"`.
    """
    words = " ".join(str(text)[: 4 * longest].split())
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)
    return shown[:longest]


def quoted(text: object, longest: int = LONGEST) -> str:
    """Return `one_line` in quotes."""
    return f"'{one_line(text, longest)}'"
