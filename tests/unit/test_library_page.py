"""docs/library.md: every snippet runs, in the order of the page, on one rank and on two."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_on_ranks

PAGE = Path(__file__).parents[2] / "docs" / "library.md"


def _run_page(text: str) -> dict[str, float]:
    """Run all Python blocks in one namespace; the numbers of the first and of the split loss."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return {name: float(names[name].value) for name in ("out", "split", "each", "whole")}


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_snippet_of_the_page_runs(ranks: int) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("```python") >= 6
    found = run_on_ranks(_run_page, ranks, text)
    assert all(numbers == found[0] for numbers in found), "the same on every rank"
    assert found[0]["split"] == pytest.approx(found[0]["out"], rel=1e-5)
