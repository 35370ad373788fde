"""The record of the slow tests: when each of them last ran, where, and how it ended.

`.ci/run` leaves the slow tests out. `bash tests/run.sh slow` runs them and writes tests/slow_tier.json, which is
committed. A fast test (tests/unit/test_slow_tier.py) fails if a slow test is missing in the record or failed in it.

    python -m tests.slow_tier build/slow.xml build/slow_servers.xml     # files that pytest --junitxml wrote

A run of a few files replaces the rows of these files and keeps the others.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.measure import machine

RECORD = Path(__file__).with_name("slow_tier.json")
OUTCOMES = ("failure", "error", "skipped")
"""Elements of a test case in JUnit's format; a case without one of them passed."""
Rows = dict[str, dict[str, Any]]


def rows(reports: Iterable[Path]) -> dict[str, Rows]:
    """{file of tests: {test function: passed, failed, skipped, seconds}}, summed over the parameters of a test."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for path in reports:
        for case in ElementTree.parse(path).iter("testcase"):
            file = case.attrib["classname"].replace(".", "/") + ".py"
            found = [child.tag for child in case if child.tag in OUTCOMES]
            outcome = "passed" if not found else "skipped" if found == ["skipped"] else "failed"
            row = counts[file, case.attrib["name"].split("[")[0]]
            row[outcome] += 1
            row["milliseconds"] += round(1000 * float(case.attrib["time"]))
    files: dict[str, Rows] = defaultdict(dict)
    for (file, name), row in sorted(counts.items()):
        numbers = {outcome: row[outcome] for outcome in ("passed", "failed", "skipped")}
        files[file][name] = numbers | {"seconds": round(row["milliseconds"] / 1000, 1)}
    return files


def merged(record: dict[str, Any], found: dict[str, Rows], where: dict[str, Any]) -> dict[str, Any]:
    """The record with the files of this run replaced."""
    new = {file: {"machine": where, "tests": tests} for file, tests in found.items()}
    return dict(sorted((record | new).items()))


def write(reports: list[Path]) -> None:
    before = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    where = {name: machine()[name] for name in ("processor", "cores", "python", "torch", "commit", "modified", "date")}
    after = merged(before, rows(reports), where)
    RECORD.write_text(json.dumps(after, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write([Path(name) for name in sys.argv[1:]])
