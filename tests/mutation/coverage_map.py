"""The lines that each test runs. Each test file runs once under coverage. The result is kept until an input changes.

Lines that run in rank processes and in commands that a test starts count for that test. A test file that fails without
a fault cannot be used and is named.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.conftest import MARK_OF_FOLDER
from tests.mutation import copies
from tests.mutation.candidates import PACKAGES
from tests.mutation.processes import NO_TESTS, PASSED, in_parallel, run_pytest

SELECTIONS = {"fast": "not slow and not sglang and not e2e", "full": "slow or sglang or e2e"}
"""Mark expression of the tests of a file by the tier that they are in."""
MAP_DEADLINE_S = {"fast": 900.0, "full": 7200.0}
SETTINGS = """\
[run]
core = ctrace
parallel = true
data_file = {data}
include = {copy}/tropd_mcore/*
sigterm = true
disable_warnings = no-data-collected
"""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Record:
    """The lines that the tests of one file and tier run."""

    file: str
    tier: str
    passed: bool
    seconds: float
    """Wall time of the whole process, under coverage."""
    tests: dict[str, float]
    """Seconds of each test with its fixtures, in the order of the file."""
    lines: dict[str, dict[str, list[int]]]
    """{product file: {context: lines}}. A context is a test, or one of those of `plugin`."""
    inputs: dict[str, str]
    """{file: digest} of all our files on which the outcome depends."""
    output: str
    """The end of pytest's output, if it failed."""


def test_files(copy: Path, tier: str) -> list[str]:
    """The files that can have tests of the tier and reach a package with faults, without those of the mutation run."""
    left_out = ("gpu", "mutation", *(MARK_OF_FOLDER if tier == "fast" else ()))
    found = (path.relative_to(copy) for path in (copy / "tests").rglob("test_*.py"))
    names = sorted(path.as_posix() for path in found if path.parts[1] not in left_out)
    return [name for name in names if copies.reaches(copy, name, PACKAGES)]


def build(spare_copies: list[Path], folder: Path, tiers: Iterable[str], say: Say) -> list[Record]:
    """The records of all test files, measured if no stored record is valid. One process per copy at a time."""
    copy = spare_copies[0]
    wanted = [(file, tier) for tier in tiers for file in test_files(copy, tier)]
    stored = {key: _load(folder, *key) for key in wanted}
    missing = [key for key in wanted if not _valid(stored[key], copy)]
    say(f"coverage of {len(wanted)} test files: {len(wanted) - len(missing)} known, {len(missing)} to run")

    def measure_one(mine: Path, numbered: tuple[int, tuple[str, str]]) -> None:
        number, key = numbered
        record = measure(mine, *key)
        _store(folder, record)
        say(f"  {number}/{len(missing)} {record.file} ({record.tier}): {_summary(record)}")

    in_parallel(measure_one, list(enumerate(missing, 1)), spare_copies)
    records = [_load(folder, *key) for key in wanted]
    return [record for record in records if record is not None]


def measure(copy: Path, file: str, tier: str) -> Record:
    """Run the tests of one file and tier under coverage."""
    data = copy.with_name(f"{copy.name}-coverage")
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    settings = data / "coveragerc"
    settings.write_text(SETTINGS.format(data=data / "lines", copy=copy), encoding="utf-8")
    ended = run_pytest(
        copy,
        ["-m", SELECTIONS[tier], file],
        name=file,
        deadline_s=MAP_DEADLINE_S[tier],
        COVERAGE_PROCESS_START=str(settings),
    )
    ended.require_sound()
    passed = ended.code in (PASSED, NO_TESTS) and not ended.late
    lines = _lines(copy, data)
    inputs = copies.imported_tests(copy, copy / file) | set(lines)
    return Record(
        file=file,
        tier=tier,
        passed=passed,
        seconds=round(ended.seconds, 2),
        tests={test: round(seconds, 3) for test, seconds in ended.report.get("seconds", {}).items()},
        lines=lines,
        inputs={name: copies.digest(copy / name) for name in sorted(inputs)},
        output="" if passed else ended.output[-2000:],
    )


def _lines(copy: Path, data: Path) -> dict[str, dict[str, list[int]]]:
    """Union over the data files that the processes left."""
    from coverage import CoverageData, CoverageException  # needed only by a mutation run, not by readers of its results

    found: dict[str, dict[str, set[int]]] = {}
    for path in sorted(data.glob("lines.*")):
        one = CoverageData(basename=str(path))
        try:
            one.read()
        except CoverageException:  # a rank that a test killed while it wrote: its lines are not counted
            continue
        for measured in one.measured_files():
            file = found.setdefault(Path(measured).relative_to(copy).as_posix(), {})
            for line, contexts in one.contexts_by_lineno(measured).items():
                for context in contexts:
                    file.setdefault(context, set()).add(line)
    return {
        name: {context: sorted(numbers) for context, numbers in sorted(contexts.items())}
        for name, contexts in sorted(found.items())
    }


def _path(folder: Path, file: str, tier: str) -> Path:
    return folder / f"{file.replace('/', '+')}.{tier}.json"


def _store(folder: Path, record: Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _path(folder, record.file, record.tier).write_text(json.dumps(asdict(record)), encoding="utf-8")


def _load(folder: Path, file: str, tier: str) -> Record | None:
    path = _path(folder, file, tier)
    return Record(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _valid(record: Record | None, copy: Path) -> bool:
    """Whether no input has changed since. A file that failed is run again."""
    return (
        record is not None
        and record.passed
        and all(copies.digest(copy / name) == digest for name, digest in record.inputs.items())
    )


def _summary(record: Record) -> str:
    if not record.passed:
        return f"FAILS WITHOUT A FAULT\n{record.output}"
    return f"{len(record.tests)} tests, {record.seconds:.0f} s, {len(record.lines)} product files"
