"""docs/troubleshooting.md quotes lines that the program writes, and names keys and pages that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tropd_mcore.config.reference import reference

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROWS = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in PAGE.splitlines() if line.startswith("| `")]


def written() -> list[str]:
    """Every text of the package, a placeholder in it as a blank; and the lines of the scripts."""
    texts = [line for path in (ROOT / "examples").glob("*.sh") for line in path.read_text().splitlines()]
    for path in (ROOT / "tropd_mcore").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


TEXTS = written()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:50])
def test_every_line_quoted_in_troubleshooting_is_written_by_the_program(row: list[str]) -> None:
    quoted = row[0].strip().strip("`").strip()
    for piece in (part.strip(" :;,()'=") for part in quoted.split("...")):
        assert any(piece in text for text in TEXTS), f"nobody writes {piece!r}"


def test_troubleshooting_has_at_least_forty_rows() -> None:
    assert len(ROWS) >= 40


def test_every_key_named_in_a_remedy_of_troubleshooting_exists() -> None:
    keys = {entry.dotted for entry in reference()}
    sections = {key.partition(".")[0] for key in keys}
    for row in ROWS:
        for text in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[\w]+)?`", " ".join(row[1:])):
            if text.partition(".")[0] in sections:
                assert text in keys, text
