"""The tables of docs/performance.md about servers and weights are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import fleet, weight_routes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("name", "module"), [("fleet", fleet), ("weight_routes", weight_routes)])
def test_the_page_has_the_tables_of_the_result(name: str, module: ModuleType) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    text = (ROOT / "docs" / "performance.md").read_text()
    rows = [module.Row(**row) for row in result["rows"]]
    for table in module.page(rows):
        assert table in text, f"docs/performance.md lacks this table of the result {name}:\n{table}"
    assert result["command"] in text and f"commit {result['machine']['commit']}" in text
