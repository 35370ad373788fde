"""The README names functions, tests, files and keys that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()
ROWS = [line.split("|")[1:-1] for line in README.split("## Equation")[1].splitlines() if line.startswith("| ")][1:]
READ_FIRST = re.findall(r"`([a-z_/]+\.py)`", README.split("Read first:")[1].split("Layers import")[0])


def named(cell: str) -> list[tuple[str, str]]:
    """(file, name) of each `file: name` of a table cell, and (file, "") of each `file`."""
    return [(file, name or "") for file, name in re.findall(r"`([\w/]+\.py)(?:: (\w+))?`", cell)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip()[:40])
def test_every_row_of_the_table_leads_to_a_function_and_a_test(row: list[str]) -> None:
    equation, function, test = row
    for folder, cell in (("tropd_mcore", function), ("tests", test)):
        found = named(cell)
        assert found or "all of" in cell, f"{equation}: nothing named in {cell!r}"
        for file, name in found:
            source = (REPOSITORY / folder / file).read_text()
            assert f"def {name}" in source if name else source


def test_the_readme_names_six_existing_files_to_read_first() -> None:
    assert len(READ_FIRST) == 6
    assert all((REPOSITORY / "tropd_mcore" / file).is_file() for file in READ_FIRST)


def test_the_folders_in_the_readme_are_those_of_the_package() -> None:
    packages = {path.parent.name for path in (REPOSITORY / "tropd_mcore").glob("*/__init__.py")}
    assert set(re.findall(r"tropd_mcore/(\w+) {2}", README)) == packages


def test_the_readme_has_at_most_250_lines() -> None:
    assert len(README.splitlines()) <= 250
