"""One fault: one text of one file, replaced by another. Positions are bytes, so that they do not depend on decoding."""

from __future__ import annotations

import ast
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`before` at bytes [start, start + len(before)) of the file becomes `after`."""

    file: str
    """Path in the repository."""
    line: int
    column: int
    operator: str
    """Name of the rule that made it (`operators`)."""
    start: int
    before: str
    after: str
    runs: tuple[int, int]
    """First and last of the lines of which one has to run for the fault to have an effect."""
    at_import: bool
    """Whether those lines run when the module is imported, not when a function is called."""

    @property
    def id(self) -> str:
        """Unique within one state of the sources."""
        after = " ".join(self.after.split())
        return f"{self.file}:{self.line}:{self.column} {self.operator} -> {after[:60]}"

    def planted(self, source: bytes) -> bytes:
        """The source with the fault. Raises AssertionError if the text is not at its place."""
        before = self.before.encode()
        end = self.start + len(before)
        assert source[self.start : end] == before, f"{self.id}: {before!r} is not at byte {self.start}"
        return source[: self.start] + self.after.encode() + source[end:]


class Source:
    """A source file with its syntax tree, and the bytes of each node."""

    def __init__(self, file: str, content: bytes) -> None:
        self.file = file
        self.content = content
        self.tree = ast.parse(content)
        self._line_starts = [0]
        for line in content.splitlines(keepends=True):
            self._line_starts.append(self._line_starts[-1] + len(line))

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """First byte of the node and the byte after its last. Parentheses around it are not included."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def at(self, line: int, column: int) -> int:
        return self._line_starts[line - 1] + column

    def place(self, byte: int) -> tuple[int, int]:
        """(line from 1, column from 0) of a byte."""
        line = self.content.count(b"\n", 0, byte) + 1
        return line, byte - self._line_starts[line - 1]

    def text(self, start: int, end: int) -> str:
        return self.content[start:end].decode()

    def text_of(self, node: ast.expr | ast.stmt) -> str:
        return self.text(*self.span(node))
