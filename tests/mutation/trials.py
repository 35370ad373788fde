"""Plant one fault in a copy, run the tests that can detect it, and report whether one did."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.mutation import copies
from tests.mutation.coverage_map import Record
from tests.mutation.faults import Fault
from tests.mutation.processes import NO_TESTS, PASSED, Ended, run_pytest
from tests.mutation.selection import Covering, covering, within

SHORTEST_TIMEOUT_S = 60.0
SLOWDOWN = 5.0
"""A test or process hangs if it takes this many times as long as without the fault, and the shortest timeout."""
FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")
"""Absolute folders in a message. They differ between machines, and the result is committed."""
START_S = 15.0
"""Time that a pytest process may need, besides its tests, for imports."""

CAUGHT, TIMEOUT, SURVIVED, NOT_COVERED = "caught", "timeout", "survived", "not covered"
OPEN = (SURVIVED, NOT_COVERED)
"""Verdicts that need a test, or a sentence why the fault changes nothing."""


@dataclass(frozen=True)
class Trial:
    """The outcome of one fault."""

    id: str
    file: str
    line: int
    operator: str
    before: str
    after: str
    verdict: str
    """`caught`, `timeout` (counts as caught), `survived`, or `not covered` by a test of the tier."""
    by: str
    """The test that failed first, and its message."""
    tests: int
    """Tests that were run until one failed."""
    files: list[str]
    """Their files, in order."""
    untried: list[str]
    """Further files that cover the fault, beyond the time limit."""
    seconds: float
    source: str
    """Digest of the file without the fault."""
    state: str
    """Digest of the product and its tests."""


def try_fault(copy: Path, fault: Fault, records: list[Record], *, limit_s: float, state: str) -> Trial:
    """Run the fast tests that cover the fault, or those of the full tier if there are none."""
    choices = covering(copy, fault, [record for record in records if record.tier == "fast"])
    if not choices:
        choices = covering(copy, fault, [record for record in records if record.tier == "full"])
    chosen = within(limit_s, choices)
    verdict, by, seconds = NOT_COVERED, "", 0.0
    if chosen:
        with copies.planted(copy, fault):
            ended = _run(copy, fault, chosen)
        verdict, by = _judge(ended)
        seconds = ended.seconds
    source = copies.digest(copy / fault.file)
    return Trial(
        **{name: getattr(fault, name) for name in ("id", "file", "line", "operator", "before", "after")},
        verdict=verdict,
        by=by,
        tests=sum(len(choice.tests) for choice in chosen),
        files=[choice.file for choice in chosen],
        untried=[choice.file for choice in choices[len(chosen) :]],
        seconds=round(seconds, 1),
        source=source,
        state=state,
    )


def _run(copy: Path, fault: Fault, chosen: list[Covering]) -> Ended:
    """One process for all files, so that imports happen once. It ends with the first failure."""
    tests = [test for choice in chosen for test in choice.tests]
    listed = copy.with_name(f"{copy.name}-tests.json")
    listed.write_text(json.dumps(tests), encoding="utf-8")
    slowest = max(choice.slowest_s for choice in chosen)
    total = START_S + sum(choice.seconds for choice in chosen)
    ended = run_pytest(
        copy,
        ["-x", f"--timeout={_timeout(slowest):.0f}", *dict.fromkeys(choice.file for choice in chosen)],
        name=fault.id,
        deadline_s=_timeout(total),
        MUTATION_TESTS=str(listed),
    )
    ended.require_sound()
    return ended


def _timeout(usual_s: float) -> float:
    return max(SHORTEST_TIMEOUT_S, SLOWDOWN * usual_s)


def _judge(ended: Ended) -> tuple[str, str]:
    """(verdict, the test that detected the fault and its message)."""
    first = ended.report.get("first_failure", {})
    by = FOLDERS.sub("", f"{first['test']}: {first['message']}") if first else ""
    if ended.late:
        return TIMEOUT, f"the process was ended after {ended.seconds:.0f} s"
    if ended.code in (PASSED, NO_TESTS):
        return SURVIVED, ""
    if "Failed: Timeout" in by or "Timeout (>" in by:
        return TIMEOUT, by
    return CAUGHT, by or f"pytest ended with code {ended.code}"


class Journal:
    """The trials so far, one JSON line each, so that an interrupted run can be continued."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._known[row["id"]] = row

    def known(self, copy: Path, fault: Fault, state: str) -> Trial | None:
        """An earlier trial that is still valid: the file, and unless a test failed everything else, is the same."""
        row = self._known.get(fault.id)
        if row is None or row["source"] != copies.digest(copy / fault.file) or row["before"] != fault.before:
            return None
        return Trial(**row) if row["state"] == state or row["verdict"] not in OPEN else None

    def add(self, trial: Trial) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(trial)) + "\n")
