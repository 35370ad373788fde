"""The committed result of the fault suite is whole: every fault was played, none is a MISS, and the page says so."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.faults import results
from tests.faults.play import Played
from tests.faults.registry import all_faults, fleet_faults
from tests.faults.results import COUNTERS, places_in
from tests.faults.table import FLEET_RESULT, KILL_LOOP, PAGE, RESULT, page
from tests.faults.verdict import GROUPS, MISS, OK, WEAK, Fault, Seen, judge

ENOUGH = 60
KILLS = 30


@cache
def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


@cache
def loop() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(KILL_LOOP.read_text(encoding="utf-8"))
    return found


@cache
def fleet() -> dict[str, Any] | None:
    """The result of the faults of a fleet, if they were played and recorded; the page says if they were not."""
    return json.loads(FLEET_RESULT.read_text(encoding="utf-8")) if FLEET_RESULT.is_file() else None


def recorded() -> list[tuple[dict[str, Any], list[Fault]]]:
    found = [(content(), all_faults())]
    if (of_fleet := fleet()) is not None:
        found.append((of_fleet, fleet_faults()))
    return found


def test_exactly_the_faults_of_the_registry_were_played() -> None:
    assert len(all_faults()) >= ENOUGH
    for result, faults in recorded():
        assert result["whole"]
        assert [row["id"] for row in result["faults"]] == [fault.id for fault in faults]


def test_no_recorded_fault_was_lost_silent_hung_or_left_running() -> None:
    for result, _ in recorded():
        assert {name: result[name] for name in COUNTERS} == dict.fromkeys(COUNTERS, 0)
        assert [row["id"] for row in result["faults"] if row["verdict"] == MISS] == []


def test_the_totals_equal_the_counts_of_the_rows() -> None:
    for result, _ in recorded():
        verdicts = [row["verdict"] for row in result["faults"]]
        assert result["totals"] == {name: verdicts.count(name) for name in (OK, WEAK, MISS)}


def test_the_results_name_their_commit_and_no_path_of_the_machine() -> None:
    for result in (*(each for each, _ in recorded()), loop()):
        assert len(result["commit"]) == 40
        assert places_in(result) == []


def test_the_killed_run_equals_an_uninterrupted_one_bit_for_bit_after_enough_kills() -> None:
    assert loop()["equal_bit_for_bit"] and loop()["problems"] == [] and loop()["kills"] >= KILLS


def test_the_page_of_faults_matches_registry_and_result() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(content(), loop(), fleet())


def test_the_representative_faults_cover_every_group_but_teacher_and_checkpoint() -> None:
    covered = {fault.group for fault in all_faults() if fault.representative}
    assert covered >= set(GROUPS) - {"teacher", "checkpoint"}


def test_faults_that_were_played_again_replace_their_rows_and_name_their_commit(tmp_path: Path) -> None:
    rows = [{"id": name, "verdict": OK, **dict.fromkeys(COUNTERS, 0)} for name in ("f", "g")]
    (tmp_path / "result.json").write_text(json.dumps({"commit": "old", "seconds": 3, "faults": rows, "totals": {}}))
    made = fault()
    again = Played(made, judge(made, seen(lost=["a step"])), seen())
    results.renew(tmp_path / "result.json", [again], tmp_path, 2.4)
    found = json.loads((tmp_path / "result.json").read_text())
    assert [row["verdict"] for row in found["faults"]] == [MISS, OK] and found["totals"] == {OK: 1, WEAK: 0, MISS: 1}
    assert (found["commit"], found["seconds"], found["lost"]) == ("old", 5, 1)
    assert "commit" in found["faults"][0] and "commit" not in found["faults"][1]
    with pytest.raises(ValueError, match="has no row of h; play all faults with --out first"):
        results.renew(tmp_path / "result.json", [dataclasses.replace(again, fault=fault(id="h"))], tmp_path, 1.0)


def fault(**changes: Any) -> Fault:
    values: dict[str, Any] = {"id": "f", "group": "kill", "done": "", "wanted": "", "play": lambda scene: Seen()}
    return Fault(**(values | {"line": "error: the cause", "limit_s": 40.0} | changes))


def seen(**changes: Any) -> Seen:
    return Seen(**({"code": 2, "output": "error: the cause", "seconds": 1.0, "silence": 1.0} | changes))


def test_an_end_with_the_expected_code_and_line_is_judged_ok() -> None:
    assert judge(fault(), seen()).verdict == OK
    assert judge(fault(code=(None,), line="restart"), seen(code=None, output="restart 1 of 2")).verdict == OK


def test_each_kind_of_miss_is_counted_once_under_its_name() -> None:
    for name, changes in {
        "lost": {"lost": ["a step"]},
        "silent": {"silence": 31.0},
        "hung": {"seconds": 41.0},
        "left_running": {"left_running": ["pid 1"]},
        "left_in_shm": {"left_in_shm": ["torch_1"]},
    }.items():
        verdict = judge(fault(), seen(**changes))
        assert verdict.verdict == MISS
        assert verdict.counted == dict.fromkeys(COUNTERS, 0) | {name: 1}


def test_an_unexpected_success_counts_as_lost_and_an_end_without_its_cause_as_silent() -> None:
    assert judge(fault(), seen(code=0)).counted["lost"] == 1
    assert judge(fault(), seen(output="step 3")).counted["silent"] == 1


def test_another_line_another_code_or_a_traceback_is_judged_weak() -> None:
    assert judge(fault(), seen(output="error: another")).verdict == WEAK
    assert judge(fault(), seen(code=1)).verdict == WEAK
    assert judge(fault(), seen(output="Traceback (most recent call last)\nerror: the cause")).verdict == WEAK
