"""Names of tests stay claims that a reader understands without the test, as far as a simple rule can tell."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
FEWEST_WORDS = 3
SPLIT_GENITIVE = re.compile(r"_s(_|$)")
"""The apostrophe of a genitive as an underscore: `the_user_s_pattern`."""


def names() -> dict[str, list[str]]:
    """{name of a test function without `test_`: files below tests/ that define it}."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name.removeprefix("test_")].append(path.relative_to(TESTS).as_posix())
    return found


def test_every_test_name_is_used_only_once() -> None:
    """Two tests with the same name make different claims, so at least one of the names is too general."""
    assert {name: files for name, files in names().items() if len(files) > 1} == {}


def test_every_test_name_has_at_least_three_words() -> None:
    assert [name for name in names() if len(name.split("_")) < FEWEST_WORDS] == []


def test_no_test_name_writes_an_apostrophe_as_an_underscore() -> None:
    assert [name for name in names() if SPLIT_GENITIVE.search(name)] == []
