"""The line per step: its width, its colours, and the time that is left."""

import io
import re

import pytest

from tropd_mcore.monitor.console import COLUMNS, LEFT_WIDTH, SHARES, Console, clock


def test_console_lines_are_aligned_and_the_header_comes_back_every_twenty_lines():
    stream = io.StringIO()
    console = Console(stream, steps=41)
    metrics = {column.metric: 0.5 for column in COLUMNS}
    extreme = {
        "loss/objective": -123456789.0,
        "optimizer/grad_norm": float("inf"),
        "trust/fraction": 1e-30,
        "entropy/student": -1234.5,
        "throughput/tokens_per_second": 1e9,
        "time/rollout": 1e12,
        "log_ratio/mean": -1e20,
    }
    for step in range(41):
        console.write(step, (metrics, {}, metrics | extreme)[step % 3])
    lines = stream.getvalue().splitlines()
    assert len({len(line) for line in lines}) == 1, "\n".join(lines[:4])
    assert [index for index, line in enumerate(lines) if line.lstrip().startswith("step")] == [0, 21, 42]
    assert lines[2].split()[:-1] == ["1/41", *["-"] * (len(COLUMNS) + len(SHARES))]
    assert lines[1].split()[:3] == ["0/41", "0.5000", "50.0"]


def test_in_a_run_with_phases_each_line_begins_with_the_phase_and_each_phase_with_a_line():
    stream = io.StringIO()
    console = Console(stream, steps=9999, phases=["sft", "tropd", "opd"])
    for step, phase in ((0, 0), (1, 0), (2, 1), (3, 2)):
        console.write(step, {column.metric: 0.5 for column in COLUMNS} | {"phase/index": float(phase)})
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == [
        "--",
        "step",
        "0:0/9999",
        "0:1/9999",
        "--",
        "1:2/9999",
        "--",
        "2:3/9999",
    ]
    assert lines[4] == "-- phase 1 (the last is 2): tropd, from step 2 --"
    assert len({len(line) for line in lines if not line.startswith("--")}) == 1
    assert max(map(len, lines)) <= 100


def test_the_lines_of_the_first_and_of_the_eleventh_phase_have_the_width_of_the_header():
    stream = io.StringIO()
    console = Console(stream, steps=60, phases=["opd"] * 11)
    for step, phase in ((0, 0), (1, 10)):
        console.write(step, {column.metric: 0.5 for column in COLUMNS} | {"phase/index": float(phase)})
    lines = [line for line in stream.getvalue().splitlines() if not line.startswith("--")]
    assert [line.split()[0] for line in lines] == ["step", "0:0/60", "10:1/60"]
    assert len({len(line) for line in lines}) == 1


GOLDEN_METRICS = {
    "loss/objective": -0.0213,
    "trust/fraction": 0.9871,
    "log_ratio/mean": -0.1234,
    "optimizer/grad_norm": 1.2345e-5,
    "entropy/student": 11.7234,
    "guidance/prefix_length": 512.0,
    "rollout/length_mean": 8095.6,
    "verifier/accuracy": 0.5703,
    "throughput/tokens_per_second": 41234.5,
    "time/step": 128.4,
    "time/rollout": 80.0,
    "time/teacher": 12.0,
    "time/forward_backward": 20.0,
    "time/optimizer": 5.0,
}
GOLDEN = """\
       step    loss trust  mean r     |g|   H_S prefix length   acc  tok/s s/step roll tch trn  left
34998/99999 -0.0213  98.7 -0.1234 1.2e-05 11.72    512   8096 0.570  41234  128.4   62   9  19   96d
"""


def test_the_console_line_of_a_long_run_is_100_columns_wide():
    stream, now = io.StringIO(), iter([0.0, 128.4])
    Console(stream, steps=99_999, now=lambda: next(now)).write(34_998, GOLDEN_METRICS)
    assert stream.getvalue() == GOLDEN
    assert {len(line) for line in stream.getvalue().splitlines()} == {100}


def test_the_time_left_is_estimated_from_the_last_steps_of_the_launch():
    stream, now = io.StringIO(), [0.0]
    console = Console(stream, steps=600, last_step=200, now=lambda: now[0])
    for step in range(100, 112):
        now[0] += 1000.0 if step == 100 else 60.0  # the first one waits for servers and compilers
        console.write(step, {})
    left = [line.split()[-1] for line in stream.getvalue().splitlines()[1:]]
    assert left[0] == "27h30" or left[0].startswith("1d")
    assert left[-1] == "88m"


def test_server_start_time_does_not_count_in_the_time_left():
    stream, now = io.StringIO(), [0.0]
    console = Console(stream, steps=60, now=lambda: now[0])
    for step, (seconds, waited) in enumerate([(45.0, 43.0), (2.0, 0.0)]):
        now[0] += seconds
        console.write(step, {"time/server": waited} if waited else {})
    assert [line.split()[-1] for line in stream.getvalue().splitlines()[1:]] == ["2m", "2m"]


def test_terminal_colours_do_not_change_the_text_or_its_width():
    plain, coloured = io.StringIO(), io.StringIO()
    for stream, colour in ((plain, False), (coloured, True)):
        Console(stream, steps=60, colour=colour, now=lambda: 0.0).write(3, GOLDEN_METRICS)
    assert "\x1b[" in coloured.getvalue() and "\x1b[" not in plain.getvalue()
    assert re.sub(r"\x1b\[\d+m", "", coloured.getvalue()) == plain.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (99.4, "99s"),
        (100, "2m"),
        (5900, "98m"),
        (6000, "1h40"),
        (86399, "1d00h"),
        (9e5, "10d"),
        (1e12, "9999d"),
    ],
)
def test_the_time_left_fits_its_column(seconds, text):
    assert clock(seconds) == text and len(text) <= LEFT_WIDTH
