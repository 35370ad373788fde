"""The tests that can detect a fault, cheapest file first.

A fault inside a function needs the tests that ran one of its lines. A fault in code that runs at import (a constant, a
class body) ran before any test, so it needs the tests that ran any line of that module or of a module that imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.mutation import copies
from tests.mutation.coverage_map import Record
from tests.mutation.faults import Fault
from tests.mutation.plugin import FIXTURES, IMPORT


@dataclass(frozen=True)
class Covering:
    """Tests of one file that can detect a fault, in the order of the file."""

    file: str
    tier: str
    tests: tuple[str, ...]
    seconds: float
    """Seconds of these tests together, measured under coverage."""
    slowest_s: float


def covering(copy: Path, fault: Fault, records: list[Record]) -> list[Covering]:
    """One entry per test file that covers the fault, cheapest first."""
    found = [_of_record(copy, fault, record) for record in records if record.passed]
    return sorted((each for each in found if each.tests), key=lambda each: (each.seconds, each.file))


def within(limit_s: float, choices: list[Covering]) -> list[Covering]:
    """As many of the first files as together take at most `limit_s`, and at least one."""
    taken: list[Covering] = []
    total = 0.0
    for choice in choices:
        total += choice.seconds
        if taken and total > limit_s:
            break
        taken.append(choice)
    return taken


def _of_record(copy: Path, fault: Fault, record: Record) -> Covering:
    first, last = fault.runs
    contexts = {
        context
        for context, lines in record.lines.get(fault.file, {}).items()
        if any(first <= line <= last for line in lines)
    }
    if fault.at_import or IMPORT in contexts:
        for module in (fault.file, *importers(copy, fault.file)):
            contexts |= record.lines.get(module, {}).keys()
    contexts -= {IMPORT}
    tests = tuple(test for test in record.tests if FIXTURES in contexts or test in contexts)
    seconds = [record.tests[test] for test in tests]
    return Covering(record.file, record.tier, tests, sum(seconds), max(seconds, default=0.0))


def importers(copy: Path, file: str) -> tuple[str, ...]:
    """The product files that import this one directly."""
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return tuple(name for name, imported in _imports(copy).items() if module in imported)


@cache
def _imports(copy: Path) -> dict[str, frozenset[str]]:
    paths = sorted((copy / "tropd_mcore").rglob("*.py"))
    return {path.relative_to(copy).as_posix(): copies.imports(path) for path in paths}
