"""The report of a run in phases: borders in its curves, phases in its settings, and a phase that never began."""

from __future__ import annotations

import json
from pathlib import Path

from tests.report_run import page_of, section, write_run
from tropd_mcore.evaluation.run_records import TrainingPhase, read_run

PHASES = """
objective:
  kind: phases  # x
  phases:
    - objective:
        kind: sft  # x
      until:
        step: 2  # x
        metric: null  # default
    - objective:
        kind: gkd  # x
        divergence: rkl  # x
      until: null  # default
"""


def write_phases(tmp_path: Path, indices: list[int]) -> Path:
    """A run of three steps in these phases."""
    run = write_run(tmp_path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = "".join(
        json.dumps({**line, "phase/index": index}) + "\n" for line, index in zip(lines, indices, strict=True)
    )
    (run / "metrics.jsonl").write_text(text)
    config = (run / "config.resolved.yaml").read_text().partition("objective:")[0]
    (run / "config.resolved.yaml").write_text(config + PHASES.lstrip())
    return run


def test_the_phases_of_a_run_are_those_of_its_logged_steps(tmp_path: Path) -> None:
    run = read_run(write_phases(tmp_path, [0, 0, 1]), token_steps=0)
    assert run.phase_names == ["sft", "gkd rkl"]
    assert run.training_phases == [TrainingPhase(0, "sft", 0, 1), TrainingPhase(1, "gkd rkl", 2, 2)]


def test_every_curve_shows_where_a_phase_begins(tmp_path: Path) -> None:
    page = page_of(write_phases(tmp_path, [0, 0, 1]))
    curves = section(page, "Curves")
    charts = [chart for chart in curves.split("<svg")[1:] if 'class="axis"' in chart]
    assert charts and all(chart.count('class="border"') == 1 and ">gkd rkl</text>" in chart for chart in charts)
    assert "A vertical line is the first step of a training phase" in curves
    assert "Trained in phases: sft in steps 0 to 1, gkd rkl in steps 2 to 2." in page


def test_a_phase_that_never_began_is_named_if_all_steps_are_done(tmp_path: Path) -> None:
    page = page_of(write_phases(tmp_path, [0, 0, 0]))
    assert "Phase 0 (sft) lasted until the steps were over, so no step was trained with gkd rkl." in page
    assert 'class="border"' not in page


def test_the_settings_show_each_phase_with_its_end(tmp_path: Path) -> None:
    settings = section(page_of(write_phases(tmp_path, [0, 0, 1])), "Settings")
    assert "<th>objective.phases.0.objective.kind</th><td>sft</td>" in settings
    assert "<th>objective.phases.0.until.step</th><td>2</td>" in settings
    assert "<th>objective.phases.0.until.metric</th>" not in settings


def test_a_run_without_phases_has_no_borders(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line | {"phase/index": None}) + "\n" for line in lines))
    assert 'class="border"' not in page_of(run) and "Trained in phases" not in page_of(run)
