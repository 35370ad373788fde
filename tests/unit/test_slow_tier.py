"""Every slow test is in the committed record of the slow tests, and passed there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import SLOW
from tests.slow_tier import RECORD, merged, rows

REPORT = """<testsuites><testsuite>
<testcase classname="tests.dist.test_a" name="test_one[x-y]" time="1.25"/>
<testcase classname="tests.dist.test_a" name="test_one[z]" time="0.5"><failure message="no"/></testcase>
<testcase classname="tests.dist.test_a" name="test_two" time="0.1"><skipped message="later"/></testcase>
<testcase classname="tests.e2e.test_b" name="test_three" time="2"><error message="setup"/></testcase>
</testsuite></testsuites>"""


def test_every_slow_test_is_in_the_record_and_passed_there(request: pytest.FixtureRequest) -> None:
    """Checks the tests that this run collected, also those that it left out by their marks."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for file, name in request.config.stash[SLOW]:
        again = f"run `bash tests/run.sh slow {file}` and commit {RECORD.name}"
        row = record.get(file, {"tests": {}})["tests"].get(name)
        assert row is not None, f"{file}: {name} is not in the record; {again}"
        assert row["failed"] == 0 and row["passed"] > 0, f"{file}: {name} failed in the record; {again}"


def test_a_report_is_summed_over_the_parameters_of_each_test(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert rows([tmp_path / "report.xml"]) == {
        "tests/dist/test_a.py": {
            "test_one": {"passed": 1, "failed": 1, "skipped": 0, "seconds": 1.8},
            "test_two": {"passed": 0, "failed": 0, "skipped": 1, "seconds": 0.1},
        },
        "tests/e2e/test_b.py": {"test_three": {"passed": 0, "failed": 1, "skipped": 0, "seconds": 2.0}},
    }


def test_a_run_of_some_files_keeps_the_record_of_the_others() -> None:
    before = {"b.py": {"machine": {"commit": "1"}, "tests": {"old": {}}}, "c.py": {"machine": {}, "tests": {}}}
    after = merged(before, {"a.py": {}, "b.py": {"new": {}}}, {"commit": "2"})
    assert list(after) == ["a.py", "b.py", "c.py"] and after["c.py"] == before["c.py"]
    assert after["b.py"] == {"machine": {"commit": "2"}, "tests": {"new": {}}}
