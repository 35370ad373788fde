"""README.md, docs/method.md and CONTRIBUTING.md name functions, tests, files and packages that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tropd_mcore.monitor.catalogue import METRICS

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
METHOD = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8")
TOUR = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1:-1] for line in METHOD.split("## Equation")[1].splitlines() if line.startswith("| ")][1:]
READ_FIRST = re.findall(r"`([a-z_/]+\.py)`", TOUR.split("Read first:")[1].split("\n\n")[0])


def named(cell: str) -> list[tuple[str, str]]:
    """(file, name) of each `file: name` of a table cell, and (file, "") of each `file`."""
    return [(file, name or "") for file, name in re.findall(r"`([\w/]+\.py)(?:: (\w+))?`", cell)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip()[:40])
def test_every_row_of_the_table_of_equations_names_an_existing_function_and_test(row: list[str]) -> None:
    equation, function, test = row
    for folder, cell in (("tropd_mcore", function), ("tests", test)):
        found = named(cell)
        assert found or "all of" in cell, f"{equation}: nothing named in {cell!r}"
        for file, name in found:
            source = (REPOSITORY / folder / file).read_text()
            assert f"def {name}" in source if name else source


def test_every_equation_of_the_method_has_a_row() -> None:
    numbers = re.findall(r"^\| (\d) \|", METHOD, flags=re.MULTILINE)
    rows = {number for equation, *_ in ROWS for number in re.findall(r"\d", equation.partition(":")[0])}
    assert set(numbers) == rows == set("1234567")


def test_contributing_names_six_existing_files_to_read_first() -> None:
    assert len(READ_FIRST) == 6
    assert all((REPOSITORY / "tropd_mcore" / file).is_file() for file in READ_FIRST)


def test_the_folders_in_contributing_are_those_of_the_package() -> None:
    packages = {path.parent.name for path in (REPOSITORY / "tropd_mcore").glob("*/__init__.py")}
    assert set(re.findall(r"tropd_mcore/(\w+) {2}", TOUR)) == packages


def test_the_readme_is_short_and_has_no_line_that_wraps() -> None:
    lines = README.splitlines()
    assert len(lines) < 200
    assert [line for line in lines if len(line) > 125 and line[:1] not in "|!"] == []


def test_the_readme_states_the_actual_number_of_metrics() -> None:
    (metrics,) = re.findall(r"(\d+) metrics", README)
    assert int(metrics) == len(METRICS)


@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_the_quickstart_result_in_the_readme_equals_the_stored_one(name: str) -> None:
    stored = json.loads((REPOSITORY / "benchmarks" / "results" / "quickstart.json").read_text())["evaluations"]
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {name}")]
    for when, cell in zip(("before", "opd", "after"), row.split("|")[2:5], strict=True):
        found = stored[when][name]
        numbers = [100 * found[key] for key in ("accuracy", "low", "high")]
        assert [float(number) for number in re.findall(r"[\d.]+", cell)] == [round(number, 1) for number in numbers]


@pytest.mark.parametrize("pair", ["bad habit", "wrong prior"])
def test_the_study_in_the_readme_is_that_of_the_page(pair: str) -> None:
    page = (REPOSITORY / "docs" / "study.md").read_text(encoding="utf-8")
    table = page.partition(f"### Three seeds: {pair}\n")[2].lstrip().partition("\n\n")[0]
    (title,) = [line for line in README.splitlines() if line.startswith("| objective |")]
    column = next(place for place, name in enumerate(title.split("|")) if name.strip().startswith(pair))
    shown = README.partition(title)[2].lstrip().partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        objective, seeds = line.split("|")[1].strip(), line.split("|")[5].split()
        (row,) = [row for row in shown.splitlines() if row.startswith(f"| {objective} |")]
        assert row.split("|")[column].strip() == ", ".join(seeds), objective
