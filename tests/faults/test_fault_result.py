"""The committed result of the fault suite is whole: every fault was played, none is a MISS, and the page says so."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tests.faults.registry import all_faults
from tests.faults.results import COUNTERS, places_in
from tests.faults.table import KILL_LOOP, PAGE, RESULT, page
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


def test_every_fault_of_the_registry_was_played_and_none_else() -> None:
    assert content()["whole"] and len(all_faults()) >= ENOUGH
    assert [row["id"] for row in content()["faults"]] == [fault.id for fault in all_faults()]


def test_nothing_was_lost_silent_hung_or_left() -> None:
    assert {name: content()[name] for name in COUNTERS} == dict.fromkeys(COUNTERS, 0)
    assert [row["id"] for row in content()["faults"] if row["verdict"] == MISS] == []


def test_the_totals_are_those_of_the_rows() -> None:
    verdicts = [row["verdict"] for row in content()["faults"]]
    assert content()["totals"] == {name: verdicts.count(name) for name in (OK, WEAK, MISS)}


def test_the_results_name_their_commit_and_no_place_of_the_machine() -> None:
    for result in (content(), loop()):
        assert len(result["commit"]) == 40
        assert places_in(result) == []


def test_the_kill_loop_is_equal_bit_for_bit_after_enough_kills() -> None:
    assert loop()["equal_bit_for_bit"] and loop()["problems"] == [] and loop()["kills"] >= KILLS


def test_the_page_is_that_of_registry_and_result() -> None:
    content()
    loop()
    assert PAGE.read_text(encoding="utf-8") == page(content(), loop())


def test_the_representative_part_has_every_group_but_teacher_and_checkpoint() -> None:
    covered = {fault.group for fault in all_faults() if fault.representative}
    assert covered >= set(GROUPS) - {"teacher", "checkpoint"}


def fault(**changes: Any) -> Fault:
    values: dict[str, Any] = {"id": "f", "group": "kill", "done": "", "wanted": "", "play": lambda scene: Seen()}
    return Fault(**(values | {"line": "error: the cause", "limit_s": 40.0} | changes))


def seen(**changes: Any) -> Seen:
    return Seen(**({"code": 2, "output": "error: the cause", "seconds": 1.0, "silence": 1.0} | changes))


def test_what_a_user_must_get_is_ok() -> None:
    assert judge(fault(), seen()).verdict == OK
    assert judge(fault(code=(None,), line="restart"), seen(code=None, output="restart 1 of 2")).verdict == OK


def test_every_kind_of_miss_is_one() -> None:
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


def test_a_lie_that_ends_well_is_lost_and_an_end_without_a_cause_is_silent() -> None:
    assert judge(fault(), seen(code=0)).counted["lost"] == 1
    assert judge(fault(), seen(output="step 3")).counted["silent"] == 1


def test_another_line_another_code_and_a_traceback_are_weak() -> None:
    assert judge(fault(), seen(output="error: another")).verdict == WEAK
    assert judge(fault(), seen(code=1)).verdict == WEAK
    assert judge(fault(), seen(output="Traceback (most recent call last)\nerror: the cause")).verdict == WEAK
