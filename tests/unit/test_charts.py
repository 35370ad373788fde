"""Charts: values at the heights of the ticks, ticks that distinguish values, extremes and gaps that are kept."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html import unescape

import numpy as np
import pytest

from tropd_mcore.evaluation.axes import ANY, LOGARITHMIC, POSITIVE, SHARE, Axis, format_value, step_ticks, tick_text
from tropd_mcore.evaluation.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Interval,
    Series,
    bar_chart,
    interval_chart,
    line_chart,
    stacked_chart,
)
from tropd_mcore.evaluation.thinning import MOST_POINTS, drawn_steps


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())]
        for line in re.findall(r'<polyline[^>]*points="([^"]*)"', svg)
    ]


def ticks_of(svg: str) -> dict[float, float]:
    """{value: height} of the vertical axis"""
    found = re.findall(r'<text class="tick" x="[\d.]+" y="([\d.]+)" text-anchor="end">([^<]+)</text>', svg)
    return {float(text): float(y) - 4 for y, text in found}


@pytest.mark.parametrize("values", [[0.0, 1.0, 0.5], [-3e-4, 7e-4, 0.0], [1e6, 3e6, 2e6], [5.0, 5.0, 5.0], [0.0] * 3])
def test_values_are_drawn_at_the_height_that_the_ticks_give_them(values):
    svg = line_chart([0, 10, 20], [Series("a", "plain", values)], description="d")
    ticks = ticks_of(svg)
    assert 3 <= len(ticks) <= 8
    (low, y_low), (high, y_high) = min(ticks.items()), max(ticks.items())
    for value, (_, y) in zip(values, points_of(svg)[0], strict=True):
        assert y == pytest.approx(y_low + (y_high - y_low) * (value - low) / (high - low), abs=0.6)


def test_a_logarithmic_chart_has_equal_distances_for_equal_factors_and_omits_zero():
    svg = line_chart([0, 1, 2, 3], [Series("a", "plain", [0.01, 1.0, 100.0, 0.0])], description="d", scale=LOGARITHMIC)
    (line,) = points_of(svg)
    assert len(line) == 3
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.2)


def test_a_missing_value_leaves_a_gap_and_an_isolated_value_is_a_point():
    svg = line_chart(
        list(range(7)), [Series("a", "plain", [1.0, 2.0, None, 3.0, float("nan"), 4.0, 5.0])], description="d"
    )
    assert [len(line) for line in points_of(svg)] == [2, 2]
    assert svg.count("<circle") == 1


def test_a_chart_of_one_step_or_of_no_values_can_be_drawn():
    assert "<circle" in line_chart([4], [Series("a", "plain", [0.5])], description="d")
    assert line_chart([4], [Series("a", "plain", [None])], description="d") == ""
    assert line_chart([], [], description="d") == ""


def test_an_interval_row_spans_its_interval():
    svg = interval_chart([Interval("model <a>", 0.5, 0.25, 1.0, "trusted")], description="d")
    ElementTree.fromstring(svg)
    grid = {0.25 * i: float(x) for i, x in enumerate(re.findall(r'class="grid" x1="([\d.]+)"', svg))}
    bar = re.search(r'class="line trusted" x1="([\d.]+)" x2="([\d.]+)"', svg)
    assert (float(bar[1]), float(bar[2])) == (grid[0.25], grid[1.0])
    assert float(re.search(r'cx="([\d.]+)"', svg)[1]) == grid[0.5]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (2488.0, "2488"),
        (0.99432, "0.994"),
        (-0.0031, "-0.00310"),
        (1234.5, "1234"),
        (1.2e-7, "1.20e-07"),
        (99.96, "100.0"),
    ],
)
def test_numbers_have_three_significant_digits_and_whole_ones_no_decimals(value, text):
    assert format_value(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.0%"), (1.0, "100.0%"), (0.99999, "99.999%"), (0.5, "50.0%")])
def test_a_share_is_shown_as_0_or_100_percent_only_if_it_is_exactly_that(value, text):
    assert format_value(value, "share") == text


def test_ticks_have_as_many_decimals_as_their_distance_needs_and_never_repeat():
    """Ticks of 0.025 once had two decimals: 1.00, 0.97, 0.95, 0.93."""
    axis = Axis.over([0.88, 1.0], ANY)
    assert [axis.text(tick) for tick in axis.ticks] == ["0.875", "0.900", "0.925", "0.950", "0.975", "1.000"]
    share = Axis.over([0.88, 1.0], SHARE)
    assert [share.text(tick) for tick in share.ticks] == ["87.5%", "90.0%", "92.5%", "95.0%", "97.5%", "100.0%"]
    generator = np.random.default_rng(0)
    for _ in range(2000):
        scale = [ANY, POSITIVE, SHARE][generator.integers(3)]
        low = generator.random() * (1.0 if scale is SHARE else 10.0 ** generator.integers(-9, 9))
        high = low + (1.0 - low if scale is SHARE else 10.0 ** generator.integers(-9, 9)) * generator.random()
        axis = Axis.over([low, high], scale)
        texts = [axis.text(tick) for tick in axis.ticks]
        assert len(set(texts)) == len(texts) >= 2, (low, high, texts)
        for tick, text in zip(axis.ticks, texts, strict=True):
            shown = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
            assert shown == pytest.approx(tick, abs=0.01 * (axis.ticks[1] - axis.ticks[0]))


def test_a_tick_text_keeps_tiny_and_huge_numbers_apart():
    assert [tick_text(tick, 2.5e-8, "number") for tick in (2.5e-8, 5e-8)] == ["2.5e-08", "5.0e-08"]
    assert tick_text(-0.0, 0.5, "number") == "0.0"


@pytest.mark.parametrize(
    ("value", "scale", "ends"),
    [(0.0, SHARE, (0, 1)), (1.0, SHARE, (0, 1)), (0.3, SHARE, (0, 1)), (0.0, POSITIVE, (0, 1)), (0.0, ANY, (-1, 1))],
)
def test_the_axis_of_a_flat_line_contains_only_possible_values(value, scale, ends):
    """A flat zero accuracy once had an axis from -1 to 1."""
    axis = Axis.over([value] * 5, scale)
    assert (axis.ticks[0], axis.ticks[-1]) == ends


def test_a_flat_line_away_from_the_limits_has_a_narrow_axis_around_it():
    axis = Axis.over([250.0] * 3, POSITIVE)
    assert 0 < axis.ticks[0] < 250 < axis.ticks[-1] < 500


def test_a_share_axis_stays_between_0_and_100_percent():
    axis = Axis.over([0.001, 0.999], SHARE)
    assert axis.low >= 0 and axis.high <= 1


def test_many_decades_have_few_ticks():
    axis = Axis.over([1e-12, 1e9], LOGARITHMIC)
    assert len(axis.ticks) <= 8 and axis.ticks[0] <= 1e-12 and axis.ticks[-1] >= 1e9


def test_the_axis_of_steps_is_named_and_ends_at_the_last_step():
    svg = line_chart(list(range(60)), [Series("a", "plain", [1.0] * 60)], description="d")
    assert ">step</text>" in svg and step_ticks(0, 59) == [0, 20, 40, 59]
    assert step_ticks(3, 3) == [3] and step_ticks(0, 1) == [0, 1]


def plot_of(svg: str) -> dict:
    return json.loads(unescape(re.search(r'data-plot="([^"]*)"', svg)[1]))


def test_the_values_shown_under_the_pointer_are_those_of_the_series():
    values = [0.123456789, None, float("nan"), -4e-9]
    plot = plot_of(line_chart([0, 5, 6, 9], [Series('a "<b>"', "plain", values)], description="d"))
    assert plot["steps"] == [0, 5, 6, 9] and plot["ends"] == [0, 9]
    assert plot["lines"][0]["label"] == 'a "<b>"'
    assert plot["lines"][0]["values"] == [pytest.approx(0.123456789, rel=1e-4), None, None, pytest.approx(-4e-9)]


@pytest.mark.parametrize("count", [500, 3000, 20_011])
def test_a_long_run_is_drawn_with_its_extremes_its_gaps_and_its_ends(count):
    generator = np.random.default_rng(count)
    lines = [generator.normal(size=count).tolist() for _ in range(3)]
    lines[0][count // 2], lines[1][count // 3], lines[2][7] = 99.0, -99.0, None
    kept = drawn_steps(count, lines)
    assert len(kept) <= MOST_POINTS * 1.05 and kept == sorted(set(kept))
    assert {0, 7, count // 3, count // 2, count - 1} <= set(kept)
    if count <= MOST_POINTS:
        assert kept == list(range(count))


def test_bars_are_as_long_as_their_shares():
    svg = bar_chart([("a <b>", 1.0, "67%"), ("c", 0.25, "17%")], description="d")
    ElementTree.fromstring(svg)
    first, second = (float(width) for width in re.findall(r'<rect[^>]*width="([\d.]+)"', svg))
    assert second == pytest.approx(first / 4, abs=0.2)


def test_stacked_shares_meet_each_other_and_fill_the_height_they_sum_up_to():
    series = [Series("low", "part0", [0.25, 0.5, None, 1.0]), Series("high", "part4", [0.75, 0.25, 0.5, 0.0])]
    svg = stacked_chart([0, 1, 2, 5], series, description="d")
    areas = [
        [tuple(map(float, pair.split(","))) for pair in points.split()]
        for points in re.findall(r'class="area \w+" points="([^"]+)"', svg)
    ]
    assert len(areas) == 4, "two areas before the gap, two after it"
    (left, right), bottom = (LEFT, LEFT + (WIDTH - LEFT - RIGHT) / 5), HEIGHT - BOTTOM
    height = HEIGHT - TOP - BOTTOM
    lower, single_lower, upper, _ = areas
    expected = [(left, bottom - height / 4), (right, bottom - height / 2), (right, bottom), (left, bottom)]
    assert [pair == pytest.approx(want, abs=0.06) for pair, want in zip(lower, expected, strict=True)] == [True] * 4
    assert upper[2:] == lower[1::-1], "the second share begins where the first ends"
    assert [y for _, y in upper[:2]] == pytest.approx([TOP, bottom - 0.75 * height], abs=0.06)
    assert single_lower[0][1] == pytest.approx(TOP, abs=0.06) and single_lower[0][0] < single_lower[1][0]


def test_shares_that_are_never_all_known_are_not_drawn():
    series = [Series("a", "part0", [None, 0.5]), Series("b", "part1", [0.5, None])]
    assert stacked_chart([0, 1], series, description="d") == ""
