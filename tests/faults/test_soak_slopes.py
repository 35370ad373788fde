"""The slope of a soak is that of the line below the noise, despite outliers. With too few readings there is none."""

from __future__ import annotations

import numpy as np

from tests.faults.soak_slopes import LEAST_READINGS, MOST_READINGS, growth


def readings(slope: float, count: int, *, noise: float = 0.0) -> tuple[list[int], list[float]]:
    steps = list(range(0, 7 * count, 7))
    deviations = np.random.default_rng(3).normal(0.0, 1.0, count) * noise
    return steps, [1e8 + slope * step + float(extra) for step, extra in zip(steps, deviations, strict=True)]


def by_hand(steps: list[int], values: list[float]) -> float:
    slopes = [
        (values[right] - values[left]) / (steps[right] - steps[left])
        for left in range(len(steps))
        for right in range(left + 1, len(steps))
    ]
    return float(np.median(slopes))


def test_a_leak_below_noise_is_found_and_is_in_its_range() -> None:
    steps, values = readings(900.0, 200, noise=20_000.0)
    found = growth(steps, values, first_step=0)
    assert found.slope is not None and found.low is not None and found.high is not None
    assert found.low < 900.0 < found.high
    assert abs(found.slope - by_hand(steps, values)) < 1e-6
    assert found.low > 0, "the range of a leak does not hold 0"


def test_a_single_jump_is_not_a_leak() -> None:
    steps, values = readings(0.0, 100)
    jumped = [value + (4e6 if place > 20 else 0.0) for place, value in enumerate(values)]
    assert growth(steps, jumped, first_step=0).slope == 0.0
    assert growth(steps, jumped, first_step=0).largest == jumped[-1]


def test_readings_of_the_warm_up_are_ignored() -> None:
    steps, values = readings(0.0, 100)
    warming = [value - max(0, 350 - step) * 5e4 for step, value in zip(steps, values, strict=True)]
    assert growth(steps, warming, first_step=350).slope == 0.0
    assert growth(steps, warming, first_step=0).slope != 0.0


def test_thinning_many_readings_keeps_the_slope() -> None:
    steps, values = readings(-12.0, 3 * MOST_READINGS)
    found = growth(steps, values, first_step=0)
    assert found.slope is not None and abs(found.slope + 12.0) < 1e-3


def test_too_few_readings_and_readings_of_one_step_have_no_slope() -> None:
    steps, values = readings(5.0, LEAST_READINGS - 1)
    assert growth(steps, values, first_step=0).slope is None
    assert growth([3] * 20, [1.0] * 20, first_step=0).slope is None
    assert growth(steps, values, first_step=10_000).slope is None
