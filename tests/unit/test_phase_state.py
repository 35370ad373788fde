"""The state of a run in phases: when a phase ends, and what a checkpoint keeps of it."""

from __future__ import annotations

import math

import pytest

from tropd_mcore.config.phases import PhasesObjective, UntilConfig
from tropd_mcore.train.phases import PhaseRun, PhaseState

NAN = math.nan


def ends_after(until: UntilConfig, values: list[float], began: int = 0) -> int | None:
    """The number of steps after which a phase ends whose metric has these values; None if it does not end."""
    state = PhaseState(index=1, began=began)
    for done, value in enumerate(values, start=began + 1):
        state = state.after(done, {"trust/tv": value}, until)
        if state.index == 2:
            assert state == PhaseState(index=2, began=done, met=0)
            return done
    return None


@pytest.mark.parametrize(
    ("until", "values", "expected"),
    [
        ({"step": 3}, [NAN] * 5, 3),
        ({"metric": "trust/tv", "below": 0.5}, [0.6, 0.5, 0.4, 0.3], 3),
        ({"metric": "trust/tv", "above": 0.5}, [0.4, 0.5, 0.6], 3),
        ({"metric": "trust/tv", "below": 0.5, "consecutive": 2}, [0.4, 0.6, 0.4, 0.4], 4),
        ({"metric": "trust/tv", "below": 0.5, "consecutive": 2}, [0.4, NAN, NAN, 0.4], 4),
        ({"metric": "trust/tv", "below": 0.5, "consecutive": 2}, [0.4, NAN, 0.6, 0.4], None),
        ({"metric": "trust/tv", "below": 0.5, "step": 3}, [0.6] * 5, 3),
        ({"metric": "trust/tv", "below": 0.5, "step": 3}, [0.4] * 5, 1),
        ({"metric": "trust/tv", "below": 0.5}, [0.6, NAN], None),
    ],
    ids=str,
)
def test_a_phase_ends_at_its_step_or_when_its_metric_was_beyond_the_bound_often_enough(
    until: dict[str, object], values: list[float], expected: int | None
) -> None:
    assert ends_after(UntilConfig.model_validate(until), values) == expected


def test_a_metric_that_the_step_does_not_have_counts_as_no_value() -> None:
    until = UntilConfig(metric="trust/tv", below=0.5, consecutive=2)
    assert PhaseState(0, 0, met=1).after(3, {}, until) == PhaseState(0, 0, met=1)


def test_steps_are_those_of_the_run_and_not_of_the_phase() -> None:
    assert ends_after(UntilConfig(step=12), [NAN] * 5, began=9) == 12


def test_the_last_phase_never_ends() -> None:
    state = PhaseState(2, 9)
    assert state.after(100, {"trust/tv": 0.0}, None) is state


def objective() -> PhasesObjective:
    return PhasesObjective.model_validate(
        {
            "phases": [
                {"objective": {"kind": "opd"}, "until": {"metric": "trust/tv", "below": 0.1, "consecutive": 3}},
                {"objective": {"kind": "gkd"}},
            ]
        }
    )


def test_a_checkpoint_keeps_phase_beginning_count_and_the_names_of_all_phases() -> None:
    assert PhaseRun(objective(), PhaseState(0, 0, 2), []).extra() == {
        "phase": {"index": 0, "began": 0, "met": 2, "names": ["opd", "gkd fkl"]}
    }


def test_a_run_that_ends_before_its_last_phase_says_so_and_what_to_change() -> None:
    message = PhaseRun(objective(), PhaseState(0, 0, 2), []).unfinished(60)
    assert message == (
        "run.steps = 60 are done but phase 0 (opd), which began after step 0, has not ended (until trust/tv is below "
        "0.1 at 3 steps in a row; trust/tv was beyond the bound at the last 2 steps in a row), so no step was trained "
        "with gkd fkl; raise run.steps, or change objective.phases.0.until"
    )
    assert PhaseRun(objective(), PhaseState(1, 9), []).unfinished(60) is None
    assert PhaseRun(objective(), PhaseState(1, 60), []).unfinished(60) == (
        "run.steps = 60 are done just as phase 1 (gkd fkl) would begin, so no step was trained with gkd fkl; raise "
        "run.steps, or change objective.phases.0.until"
    )
