"""Hints name a better objective for the runs that need one, and are silent otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tropd_mcore.config.schema import Config
from tropd_mcore.monitor.hints import of_evaluation, of_first_step

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


@pytest.mark.parametrize("objective", [{"kind": "tropd"}, {"kind": "gkd"}, {"kind": "sft"}, {"kind": "sdpo"}])
def test_objectives_that_leave_confident_mistakes_or_are_not_known_get_no_hint(objective: dict[str, Any]) -> None:
    assert list(of_first_step({"trust/tv": 0.99}, config_of(objective))) == []


@pytest.mark.parametrize("distance", [0.5, 0.02, math.nan])
def test_a_near_pair_and_a_step_without_tokens_get_no_hint(distance: float) -> None:
    assert list(of_first_step({"trust/tv": distance}, config_of({"kind": "opd"}))) == []


def test_the_stored_quickstart_gets_the_hint_about_its_tail_and_the_switch_turns_it_off() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text())["evaluations"]["after"]
    accuracies = stored["greedy"]["accuracy"], stored["sampled"]["accuracy"]
    (line,) = of_evaluation(*accuracies, config_of({"kind": "tropd"}))
    assert "sampled accuracy is 17 points below greedy" in line and "monitor.hint_gap=0.08" in line
    assert list(of_evaluation(*accuracies, config_of({"kind": "tropd"}, hint_gap=None))) == []


@pytest.mark.parametrize(
    ("objective", "greedy", "sampled"), [({"kind": "opd"}, 0.97, 0.86), ({"kind": "tropd"}, 0.4, 0.42)]
)
def test_runs_without_a_gates_tail_get_no_hint(objective: dict[str, Any], greedy: float, sampled: float) -> None:
    """OPD's run of the README, and the student before training."""
    assert list(of_evaluation(greedy, sampled, config_of(objective))) == []
