"""The last lines of the quickstart: rows, of which one is recorded and must be comparable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import quickstart_table
from examples.arithmetic.settings import FULL
from examples.make_models import _content_hash

SETTINGS = {"prompts": "a.jsonl", "samples": 4, "temperature": 1.0, "template_date": None}


def evaluation(greedy: float, sampled: float, **settings: object) -> dict[str, object]:
    def score(accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.05}

    return {
        "model": "models/a/misled",
        "greedy": score(greedy),
        "sampled": score(sampled),
        "settings": {**SETTINGS, **settings},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "example.json").write_text('{"content_hash": "abc"}')
    (tmp_path / "evaluation_before.json").write_text(json.dumps(evaluation(0.12, 0.11)))
    (tmp_path / "evaluation_after.json").write_text(json.dumps(evaluation(0.9, 0.8)))
    return tmp_path


def recorded(**compared: object) -> dict[str, object]:
    evaluated = {"samples": 4, "temperature": 1.0}
    return {
        "command": "the command",
        "commit": "0123",
        "compared": {"models": "abc", "student": "misled", "evaluation": evaluated, **compared},
        "accuracies": {"greedy": [0.05, 0.01, 0.1], "sampled": [0.04, 0.02, 0.06]},
    }


def test_the_recorded_row_stands_between_before_and_after_with_the_command_that_repeats_it(run: Path) -> None:
    lines = quickstart_table.table(run, run, recorded())
    assert [line.split("  ")[0] for line in lines[1:4]] == ["before", "after OPD (recorded)", "after this run"]
    assert "5.0 % [1.0, 10.0]" in lines[2] and "4.0 % [2.0, 6.0]" in lines[2]
    assert "90.0 % [80.0, 95.0]" in lines[3]
    assert "recorded at commit 0123" in lines[4] and "the command" in lines[5]


@pytest.mark.parametrize(
    "other", [{"models": "xyz"}, {"student": "student"}, {"evaluation": {"samples": 8, "temperature": 1.0}}]
)
def test_a_recorded_row_of_other_models_another_student_or_evaluation_is_not_shown(
    run: Path, other: dict[str, object]
) -> None:
    lines = quickstart_table.table(run, run, recorded(**other))
    assert len(lines) == 3 and "recorded" not in "\n".join(lines)


@pytest.mark.parametrize("text", [None, "", "{"])
def test_a_missing_or_damaged_evaluation_is_named(run: Path, text: str | None) -> None:
    path = run / "evaluation_after.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=r"evaluation_after\.json: expected a result of the quickstart"):
        quickstart_table.table(run, run, None)


def test_the_recorded_row_is_of_the_models_that_the_quickstart_makes() -> None:
    found = json.loads(quickstart_table.RECORDED.read_text())
    assert (found["compared"]["models"], found["compared"]["student"]) == (_content_hash(FULL), "misled")
    assert found["command"] == quickstart_table.COMMAND
