"""The tests that are run for a fault are those that can detect it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutation.coverage_map import Record
from tests.mutation.faults import Fault
from tests.mutation.selection import covering, within

FILE = "tropd_mcore/data/example.py"
USER = "tropd_mcore/train/user.py"
SECONDS = {"t::a": 1.0, "t::b": 2.0, "t::c": 4.0}


def record(lines: dict[str, dict[str, list[int]]]) -> Record:
    return Record("t", "fast", True, 9.0, SECONDS, lines, {}, "")


def fault(*, at_import: bool) -> Fault:
    return Fault(FILE, 5, 0, "constant", 0, "1", "2", (5, 6), at_import)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository of two modules, one of which imports the other."""
    for name, text in ((FILE, "x = 1\n"), (USER, "from tropd_mcore.data.example import x\n")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def chosen(copy: Path, lines: dict[str, dict[str, list[int]]], *, at_import: bool = False) -> tuple[str, ...]:
    found = covering(copy, fault(at_import=at_import), [record(lines)])
    return found[0].tests if found else ()


def test_a_fault_in_a_function_selects_the_tests_that_ran_one_of_its_lines(copy: Path) -> None:
    assert chosen(copy, {FILE: {"t::a": [4, 7], "t::b": [6], "t::c": [5, 6]}}) == ("t::b", "t::c")


def test_code_run_by_a_shared_fixture_counts_for_all_tests_of_the_file(copy: Path) -> None:
    assert chosen(copy, {FILE: {"fixtures": [5]}}) == ("t::a", "t::b", "t::c")


def test_a_fault_in_import_code_selects_the_tests_that_use_the_module_or_an_importer(copy: Path) -> None:
    lines = {FILE: {"": [5], "t::a": [9]}, USER: {"": [1], "t::c": [3]}, "tropd_mcore/other.py": {"t::b": [1]}}
    assert chosen(copy, lines, at_import=True) == ("t::a", "t::c")


def test_a_function_that_ran_while_modules_were_imported_counts_as_import(copy: Path) -> None:
    assert chosen(copy, {FILE: {"": [5], "t::b": [9]}}) == ("t::b",)


def test_a_test_file_that_fails_without_a_fault_is_not_used(copy: Path) -> None:
    bad = replace(record({FILE: {"t::a": [5]}}), passed=False)
    assert covering(copy, fault(at_import=False), [bad]) == []


def test_the_cheapest_test_files_are_selected_first_and_the_first_always(copy: Path) -> None:
    records = [
        replace(record({FILE: {test: [5]}}), file=name, tests={test: SECONDS[test]})
        for name, test in (("slow", "t::c"), ("quick", "t::a"), ("middle", "t::b"))
    ]
    found = covering(copy, fault(at_import=False), records)
    assert [each.file for each in found] == ["quick", "middle", "slow"]
    assert [each.file for each in within(3.5, found)] == ["quick", "middle"]
    assert [each.file for each in within(0.1, found)] == ["quick"]
