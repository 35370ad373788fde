"""The plan, the results and the page of a study; no run is made here (see tests/e2e/test_study.py)."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.study_results import PLAN, result, write_plan
from tropd_mcore.config.hints import of_evaluation, of_first_step
from tropd_mcore.config.loader import load
from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.evaluation.statistics import t_half_width
from tropd_mcore.study.alarms import EVALUATION, FIRST_STEP, judge
from tropd_mcore.study.cell import finished
from tropd_mcore.study.page import page_files
from tropd_mcore.study.plan import read_study
from tropd_mcore.study.result import CellResult, load_result
from tropd_mcore.study.tables import accuracy_table, reached, rows_of

ROOT = Path(__file__).resolve().parents[2]


def changed(change: dict[str, Any]) -> dict[str, Any]:
    """The plan with dotted keys replaced; None removes one."""
    plan: dict[str, Any] = json.loads(json.dumps(PLAN))
    for dotted, value in change.items():
        *sections, leaf = dotted.split("/")
        node = plan
        for section in sections:
            node = node[section]
        if value is None:
            del node[leaf]
        else:
            node[leaf] = value
    return plan


def test_cells_are_pairs_times_objectives_times_seeds_with_the_untrained_student_first(tmp_path: Path) -> None:
    study = read_study(write_plan(tmp_path, PLAN))
    assert [cell.name for cell in study.cells] == [
        "habit-before-seed1",
        "habit-opd-seed1",
        "habit-fkl-seed1",
        "habit-before-seed2",
        "habit-opd-seed2",
        "habit-fkl-seed2",
    ]


def test_settings_of_the_pair_come_last_and_know_their_seed(tmp_path: Path) -> None:
    plan = changed({"objectives/opd/by_pair": {"habit": {"optimizer.learning_rate": 3.0e-4}}})
    plan["settings"]["data.prompts"] = "{folder}/train.jsonl"
    plan["pairs"]["habit"]["folder"] = "models/seed-{seed}"
    cell = next(c for c in read_study(write_plan(tmp_path, plan)).cells if c.name == "habit-opd-seed2")
    config = cell.load()
    assert config.optimizer.learning_rate == 3e-4
    assert config.run.seed == 2
    assert str(config.student.path) == "models/seed-2/student"
    assert str(config.data.prompts) == "models/seed-2/train.jsonl"
    assert config.run.dir.name == "habit-opd-seed2"
    assert cell.prepare == (("python", "-m", "examples.make_models", "models/seed-2"),)


def test_variants_of_a_group_are_cells_of_their_own(tmp_path: Path) -> None:
    plan = changed(
        {"groups/main/variants": {"low": {"optimizer.learning_rate": 1e-5}, "high": {"optimizer.learning_rate": 1e-3}}}
    )
    cells = {cell.name: cell for cell in read_study(write_plan(tmp_path, plan)).cells}
    assert cells["habit-opd-high-seed1"].load().optimizer.learning_rate == 1e-3
    assert cells["habit-opd-low-seed1"].load().optimizer.learning_rate == 1e-5
    assert "habit-before-seed1" in cells


@pytest.mark.parametrize(
    "value",
    [1, 1.5, True, None, "word", ["a", "b"], [{"objective": {"kind": "opd"}, "until": {"step": 3}}], {"a": [1, 2]}],
)
def test_an_override_says_what_the_file_says(tmp_path: Path, value: object) -> None:
    from tropd_mcore.study.plan import override

    _, text = override("objective.key", value, {}).split("=", 1)
    assert yaml.safe_load(text) == value


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"groups/main/objectives": ["opd", "nothing"]}, "groups.main.objectives: 'nothing' is not defined"),
        ({"groups/main/pairs": ["none"]}, "groups.main.pairs: 'none' is not defined"),
        ({"groups/main/seeds": []}, "groups.main.seeds"),
        ({"groups/main/seeds": [1, 1]}, "has a seed twice"),
        ({"reference": "kto"}, "reference: no objective 'kto'"),
        ({"results": None}, "results: field required"),
        ({"speed": 3}, "speed: extra inputs are not permitted"),
        ({"evaluation/samples": -1}, "evaluation.samples"),
        ({"objectives/opd/by_pair": {"nobody": {}}}, "objectives.opd.by_pair: no pair 'nobody'"),
        ({"objectives/opd/settings": {"objective.kind": "odp"}}, "objective.kind"),
        ({"objectives/opd/settings": {"objective.kid": "opd"}}, "objective.kid"),
        ({"settings": {"run.steps": -3}}, "run.steps"),
        ({"pairs/Bad name": {"label": "x", "settings": {}}}, "'Bad name' is no name for a file"),
        ({"pairs/before": {"label": "x", "settings": {}}}, "'before' is no name for a file"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_a_wrong_plan_is_refused_with_the_place_of_the_fault(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_study(write_plan(tmp_path, changed(change)))
    assert line in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "name: [", "\x00"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_study(path)


def test_a_result_with_other_settings_is_not_taken_for_this_cell(tmp_path: Path) -> None:
    study = read_study(write_plan(tmp_path, PLAN))
    cell = study.cells[1]
    assert not finished(study, cell)
    found = result("opd", 1)
    replace(found, settings=list(cell.overrides)).save(study.result(cell))
    assert finished(study, cell)
    replace(found, settings=[*cell.overrides[:-1], "run.steps=7"]).save(study.result(cell))
    with pytest.raises(DataError, match=r"other settings .*run\.steps=7"):
        finished(study, cell)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"cell": 1}', '{"accuracy": 3}'])
def test_a_damaged_result_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"x\.json: expected the result of a study's run"):
        load_result(path)


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = result("opd", 1, curve=[0.1, None, 0.5])
    found.save(tmp_path / "r.json")
    assert load_result(tmp_path / "r.json") == found


def test_the_interval_is_students_t() -> None:
    # 1, 2, 3: standard deviation 1, t(2) = 4.303, sqrt(3)
    assert t_half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert t_half_width([1.0, 3.0]) == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2))
    assert math.isnan(t_half_width([1.0]))


def test_differences_are_paired_by_seed_and_not_by_place(tmp_path: Path) -> None:
    plan = read_study(write_plan(tmp_path, PLAN)).plan
    results = [
        result("opd", 1, sampled=0.5),
        result("opd", 2, sampled=0.9),
        result("fkl", 2, sampled=0.8),  # the other order: 0.8 - 0.9 and 0.6 - 0.5
        result("fkl", 1, sampled=0.6),
    ]
    row = accuracy_table(plan, rows_of(plan, results, "main", "habit"))[-1]
    # differences +0.1 and -0.1: mean 0, half interval 12.706 * 0.1414 / 1.4142
    assert "| +0.0 ± 127.1 |" in row or "| -0.0 ± 127.1 |" in row
    assert "| 60.0 80.0 |" in row


def test_a_missing_seed_is_left_out_of_the_difference(tmp_path: Path) -> None:
    plan = read_study(write_plan(tmp_path, PLAN)).plan
    results = [result("opd", 1, sampled=0.5), result("fkl", 1, sampled=0.7), result("fkl", 2, sampled=0.1)]
    row = accuracy_table(plan, rows_of(plan, results, "main", "habit"))[-1]
    assert "| +20.0 |" in row


def test_the_first_step_with_right_rollouts_is_a_mean_of_five_steps() -> None:
    assert reached(result("opd", 1, curve=[0.0, 1, 1, 1, 1, 1, 1])) == 4
    assert reached(result("opd", 1, curve=[0.0, 0, 0, 1, 1, 1])) is None
    assert reached(result("opd", 1, curve=[1.0, 1, 1, 1])) is None


def test_the_page_follows_from_the_results_and_says_what_is_missing(tmp_path: Path) -> None:
    study = read_study(write_plan(tmp_path, PLAN))
    with pytest.raises(DataError, match="no result"):
        page_files(study)
    for cell in study.cells[:3]:
        made = result(cell.objective, cell.seed, curve=[0.1, 0.2, 0.3])
        replace(made, cell=cell.name, settings=list(cell.overrides)).save(study.result(cell))
    files = page_files(study)
    assert files == page_files(study)
    page = files[Path(study.plan.page)]
    assert "3 runs are shown: 2 trained students and 1 evaluations of students before training. 3 runs" in page
    assert "![Curves: Two seeds: bad habit](images/study-small-main-habit.svg)" in page
    image = next(text for path, text in files.items() if path.suffix == ".svg")
    assert image.startswith("<svg xmlns=") and "OPD" in image and "data-plot" not in image


def test_hints_are_judged_by_the_other_runs_of_the_same_student() -> None:
    first = "hint: trust/tv is 0.94 at step 0, ..."

    def run(kind: str, seed: int, sampled: float, *hints: str) -> CellResult:
        return replace(result(kind, seed, sampled=sampled, hints=hints), settings=[f"objective.kind={kind}"])

    right, false, silent = run("opd", 1, 0.1, first), run("opd", 2, 0.9, first), run("opd", 3, 0.1)
    teachers = [run("gkd", seed, 0.5) for seed in (1, 2, 3)]
    alone = run("opd", 4, 0.1, first)
    longer = replace(run("gkd", 4, 0.5), steps=teachers[0].steps + 1)  # had more samples, so it judges nothing
    step0, after = judge([right, false, silent, alone, longer, *teachers])
    # of the runs with gkd nothing named but themselves is there; so three runs of OPD are judged
    assert (step0.runs, step0.given, step0.right, step0.false_alarms, step0.missed) == (3, 2, 1, 1, 1)
    assert (after.given, after.missed) == (0, 0)  # opd and gkd are what this hint names


def test_the_words_that_tell_the_hints_apart_are_those_of_the_rules() -> None:
    opd, _ = load(ROOT / "configs" / "quickstart-cpu.yaml", ["objective={kind: opd, topk: 16}"])
    tropd, _ = load(ROOT / "configs" / "quickstart-cpu.yaml", [])
    (first,) = of_first_step({"trust/tv": 0.9}, opd)
    (after,) = of_evaluation(0.9, 0.5, tropd)
    assert FIRST_STEP.words in first and FIRST_STEP.words not in after
    assert EVALUATION.words in after and EVALUATION.words not in first
    assert all(name in first for name in FIRST_STEP.names) and all(name in after for name in EVALUATION.names)


STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=[path.name for path in STUDIES])
def test_the_committed_page_is_that_of_the_committed_results(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = read_study(path.relative_to(ROOT))
    if not Path(study.plan.page).is_file():
        pytest.skip(f"{study.plan.page} is not written yet")
    for file, text in page_files(study).items():
        assert file.read_text(encoding="utf-8") == text, f"run tropd study {study.path} --page"


@pytest.mark.parametrize("path", STUDIES, ids=[path.name for path in STUDIES])
def test_every_committed_result_belongs_to_a_cell_with_the_same_settings(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    study = read_study(path.relative_to(ROOT))
    cells = {study.result(cell): cell for cell in study.cells}
    for file in Path(study.plan.results).glob("*.json"):
        assert file in cells, f"{file} belongs to no cell of {path}"
        assert finished(study, cells[file])
