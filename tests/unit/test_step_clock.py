"""Phases of a step: no time is counted twice, and time after a step's line is in the next line."""

import re
from pathlib import Path

import pytest

from tropd_mcore.monitor import clock as module
from tropd_mcore.monitor.catalogue import PHASES
from tropd_mcore.monitor.clock import StepClock
from tropd_mcore.monitor.console import SHARES

PACKAGE = Path(__file__).parents[2] / "tropd_mcore"


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of day, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_the_time_of_an_inner_phase_does_not_count_in_the_outer_one(seconds):
    clock = StepClock()
    with clock.phase("rollout"):
        seconds[0] += 2
        with clock.phase("publish"):
            seconds[0] += 5
        seconds[0] += 1
    seconds[0] += 4
    assert clock.take() == {"rollout": 3.0, "publish": 5.0, "step": 12.0}


def test_repeated_phases_are_added_up_and_empty_ones_left_out(seconds):
    clock = StepClock()
    for _ in range(2):
        with clock.phase("teacher"):
            seconds[0] += 1.5
    with clock.phase("student"):
        seconds[0] += 0.0005
    assert clock.take() == {"teacher": 3.0, "step": pytest.approx(3.0005)}


def test_time_after_the_line_of_a_step_counts_in_the_next_line(seconds):
    clock = StepClock()
    with clock.phase("metrics"):
        seconds[0] += 1
        first = clock.take()
        seconds[0] += 2
    with clock.phase("checkpoint"):
        seconds[0] += 30
    with clock.phase("rollout"):
        seconds[0] += 7
    assert first == {"metrics": 1.0, "step": 1.0}
    assert clock.take() == {"metrics": 2.0, "checkpoint": 30.0, "rollout": 7.0, "step": 39.0}


def test_an_exception_ends_its_phase(seconds):
    clock = StepClock()
    with pytest.raises(RuntimeError), clock.phase("rollout"), clock.phase("publish"):
        seconds[0] += 1
        raise RuntimeError
    seconds[0] += 9
    assert clock.take() == {"publish": 1.0, "step": 10.0}


def test_the_measured_phases_are_exactly_those_of_the_catalogue():
    sources = [path.read_text() for path in PACKAGE.rglob("*.py")]
    measured = {name for source in sources for name in re.findall(r'clock\.phase\("(\w+)"\)', source)}
    assert measured == PHASES.keys() - {"step"}
    assert {phase for _, phases in SHARES for phase in phases} <= {f"time/{name}" for name in PHASES}
