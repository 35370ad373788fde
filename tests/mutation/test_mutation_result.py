"""The committed result of the mutation run is complete: drawn by its seed, with a verdict on every open fault."""

from __future__ import annotations

import ast
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.mutation.copies import REPOSITORY
from tests.mutation.results import RESULTS, table
from tests.mutation.trials import CAUGHT, NOT_COVERED, OPEN, SURVIVED, TIMEOUT

PATH = RESULTS / "seed-0.json"
VERDICTS = Path(__file__).with_name("verdicts.yaml")
ENOUGH = 100


def content() -> dict[str, Any]:
    assert PATH.is_file(), (
        f"no {PATH.relative_to(REPOSITORY)}: run `python -m tests.mutation` and commit what it writes"
    )
    found: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return found


def answers() -> dict[str, dict[str, str]]:
    """{fault: {"caught_by": test} or {"changes_nothing": sentence}}."""
    return yaml.safe_load(VERDICTS.read_text(encoding="utf-8")) or {}


def test_the_result_has_enough_faults_drawn_by_its_seed() -> None:
    found = content()
    assert found["seed"] == 0
    assert len(found["faults"]) >= ENOUGH, f"{len(found['faults'])} faults: a partial run; run it with --count {ENOUGH}"
    assert len(found["faults"]) == found["count"] == len({fault["id"] for fault in found["faults"]})
    assert sum(found["totals"].values()) == found["count"]
    assert {fault["verdict"] for fault in found["faults"]} <= {CAUGHT, TIMEOUT, SURVIVED, NOT_COVERED}


def test_no_test_file_failed_without_a_fault() -> None:
    assert content()["not_used"] == [], "these test files failed without a fault"


def test_every_open_fault_names_a_test_that_catches_it_or_says_why_it_changes_nothing() -> None:
    unanswered = [
        fault["id"] for fault in content()["faults"] if fault["verdict"] in OPEN and fault["id"] not in answers()
    ]
    assert not unanswered, f"not in {VERDICTS.name}: {unanswered}"


def test_every_verdict_is_about_a_fault_of_the_result() -> None:
    unknown = sorted(answers().keys() - {fault["id"] for fault in content()["faults"]})
    assert not unknown, f"in {VERDICTS.name} but not in {PATH.name}: {unknown}"


def test_every_verdict_is_one_sentence_or_one_existing_test() -> None:
    for fault, answer in answers().items():
        assert len(answer) == 1 and set(answer) <= {"caught_by", "changes_nothing"}, (fault, answer)
        if "caught_by" in answer:
            file, _, name = answer["caught_by"].partition("::")
            assert name.split("[")[0] in functions(file), f"{fault}: no test {answer['caught_by']}"
        else:
            assert len(answer["changes_nothing"].split()) >= 5, f"{fault}: say why it changes nothing"


def test_the_committed_table_matches_the_result() -> None:
    expected = table(content())
    assert PATH.with_suffix(".md").read_text(encoding="utf-8") == expected


@cache
def functions(file: str) -> frozenset[str]:
    """The functions at the top level of a test file."""
    path = REPOSITORY / file
    assert path.is_file(), f"no test file {file}"
    tree = ast.parse(path.read_bytes())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
