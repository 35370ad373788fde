"""Hints name a better objective for the runs that need one, and are silent otherwise."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.report_run import Tree, page_of, result_of, write_run
from tropd_mcore.config.derived import phase_configs
from tropd_mcore.config.hints import of_evaluation, of_first_step
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import DataError
from tropd_mcore.evaluation.report import ReportOptions, write_report
from tropd_mcore.evaluation.stored_hints import hints_of_run

ROOT = Path(__file__).parents[2]


def config_of(objective: dict[str, Any], **monitor: Any) -> Config:
    paths = {"student": {"path": "a"}, "teacher": {"path": "b"}, "run": {"dir": "c"}}
    data = {"prompts": "p", "teacher_responses": "r"}
    return Config.model_validate({**paths, "data": data, "objective": objective, "monitor": monitor})


@pytest.mark.parametrize("kind", ["opd", "reopold", "lsm", "vopd"])
def test_a_far_pair_and_a_policy_gradient_get_a_hint_with_the_number_and_the_key(kind: str) -> None:
    (line,) = of_first_step({"trust/tv": 0.81}, config_of({"kind": kind}))
    assert line.startswith("hint: trust/tv is 0.81 at step 0") and f"objective.kind={kind}" in line
    assert "monitor.hint_distance=0.5" in line


@pytest.mark.parametrize("kind", ["tropd", "aopd", "tropd_aopd"])
def test_a_far_pair_and_a_gate_that_keeps_a_tail_get_a_hint(kind: str) -> None:
    (line,) = of_first_step({"trust/tv": 0.81}, config_of({"kind": kind}))
    assert f"objective.kind={kind} leaves confident mistakes but hardly trains what remains of them" in line


@pytest.mark.parametrize("objective", [{"kind": "gkd"}, {"kind": "sft"}, {"kind": "sdpo"}])
def test_objectives_that_repair_a_far_pair_or_are_not_known_get_no_hint(objective: dict[str, Any]) -> None:
    assert list(of_first_step({"trust/tv": 0.99}, config_of(objective))) == []


@pytest.mark.parametrize("distance", [0.5, 0.02, math.nan])
def test_a_near_pair_and_a_step_without_tokens_get_no_hint(distance: float) -> None:
    assert list(of_first_step({"trust/tv": distance}, config_of({"kind": "opd"}))) == []


def test_a_stored_run_of_tropd_gets_the_hint_about_its_tail_and_the_switch_turns_it_off() -> None:
    results = ROOT / "benchmarks" / "results" / "study"
    stored = json.loads((results / "habit-tropd_guided-seed1.json").read_text())["accuracy"]
    accuracies = stored["greedy"], stored["sampled"]
    (line,) = of_evaluation(*accuracies, config_of({"kind": "tropd"}))
    assert "points below greedy" in line and "monitor.hint_gap=0.08" in line
    assert list(of_evaluation(*accuracies, config_of({"kind": "tropd"}, hint_gap=None))) == []


def test_the_stored_quickstart_gets_no_hint() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text())["evaluations"]["after"]
    assert (
        list(of_evaluation(stored["greedy"]["accuracy"], stored["sampled"]["accuracy"], config_of({"kind": "gkd"})))
        == []
    )


@pytest.mark.parametrize(
    ("objective", "greedy", "sampled"), [({"kind": "opd"}, 0.97, 0.86), ({"kind": "tropd"}, 0.4, 0.42)]
)
def test_runs_without_a_gates_tail_get_no_hint(objective: dict[str, Any], greedy: float, sampled: float) -> None:
    """A run of OPD on a nearly right student, and that student before training."""
    assert list(of_evaluation(greedy, sampled, config_of(objective))) == []


def stored_run(folder: Path, kind: str, *, tv: float, greedy: int = 30, sampled: int = 30) -> Path:
    """A run that trained `kind` with this distance at step 0, whose student answered so many of 40 right."""
    run = write_run(folder)
    config = run / "config.resolved.yaml"
    config.write_text(config.read_text().partition("objective:")[0] + f"objective:\n  kind: {kind}\n")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0]["trust/tv"] = tv
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    after = result_of(str(run / "export"), greedy)
    replace(after, sampled=result_of("x", sampled).greedy).save(run / "evaluation_after.json")
    return run


@pytest.mark.parametrize(
    ("kind", "tv", "greedy", "sampled", "words"),
    [
        ("opd", 0.81, 5, 4, ["trust/tv is 0.81 at step 0"]),
        ("opd", 0.03, 39, 36, []),
        ("tropd", 0.81, 39, 25, ["trust/tv is 0.81 at step 0", "sampled accuracy is 35 points below greedy"]),
        ("tropd", 0.3, 39, 25, ["sampled accuracy is 35 points below greedy"]),
        ("tropd", 0.03, 39, 38, []),
        ("gkd", 0.81, 39, 20, []),
    ],
)
def test_a_stored_run_gives_the_hints_of_its_numbers_and_the_report_shows_them(
    tmp_path: Path, kind: str, tv: float, greedy: int, sampled: int, words: list[str]
) -> None:
    run = stored_run(tmp_path, kind, tv=tv, greedy=greedy, sampled=sampled)
    found = hints_of_run(run)
    assert len(found) == len(words) and all(word in line for word, line in zip(words, found, strict=True))
    page = page_of(run)
    assert page.count('<p class="warning">hint: ') == len(words)
    assert all(line in " ".join(Tree(page).text) for line in found)


def test_a_comparison_shows_the_hints_of_each_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    far, near = stored_run(tmp_path / "a", "opd", tv=0.9), stored_run(tmp_path / "b", "opd", tv=0.1)
    assert "<tr><th>Hints</th><td>hint: trust/tv is 0.90 at step 0" in page_of(far, compare=[near])
    assert "<th>Hints</th>" not in page_of(near, compare=[stored_run(tmp_path, "gkd", tv=0.9)])


def test_a_run_without_step_0_and_without_sampled_answers_gives_no_hint(tmp_path: Path) -> None:
    run = stored_run(tmp_path, "opd", tv=0.9)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().partition("\n")[2])
    replace(result_of(str(run / "export"), 30), sampled=None).save(run / "evaluation_after.json")
    assert hints_of_run(run) == []


@pytest.mark.parametrize(
    ("config", "words"),
    [("", "config.resolved.yaml: not found"), ("objective:\n  kind: gone\n", "this release cannot read it")],
)
def test_a_run_whose_configuration_cannot_be_read_says_that_its_hints_are_unknown(
    tmp_path: Path, config: str, words: str
) -> None:
    run = stored_run(tmp_path, "opd", tv=0.9)
    (run / "config.resolved.yaml").unlink()
    if config:
        (run / "config.resolved.yaml").write_text(config)
    with pytest.raises(DataError, match=words) as caught:
        hints_of_run(run)
    assert "\n" not in str(caught.value) and "left out" in str(caught.value)
    report = write_report(run, ReportOptions())
    assert str(caught.value) in report.warnings and words in report.path.read_text(encoding="utf-8")


def test_keys_of_another_release_do_not_hide_a_hint(tmp_path: Path) -> None:
    run = stored_run(tmp_path, "opd", tv=0.9)
    config = run / "config.resolved.yaml"
    config.write_text(config.read_text() + "monitor:\n  a_key_of_tomorrow: 3\n")
    assert len(hints_of_run(run)) == 1


def test_a_run_in_phases_is_judged_by_its_first_phase_at_step_0_and_by_its_last_phase_after_it() -> None:
    phases = [{"objective": {"kind": "opd"}, "until": {"step": 9}}, {"objective": {"kind": "tropd"}}]
    first, last = phase_configs(config_of({"kind": "phases", "phases": phases}))
    (line,) = of_first_step({"trust/tv": 0.81}, first)
    assert "objective.kind=opd is slow" in line
    (line,) = of_evaluation(0.9, 0.5, last)
    assert "objective.kind=tropd hardly trains them" in line
