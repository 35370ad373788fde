"""Progress output: its lines, when they are logged, the end of the thread, and bars that do not mix with lines."""

import io
import logging
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tropd_mcore import logs
from tropd_mcore import progress as module
from tropd_mcore.progress import Progress, activity, counted, duration, progress, ticks

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger("tropd_mcore.test")


def state(what: str = "rollout.server", *, begun: float = 0.0, moved: float | None = None, **values) -> Progress:
    return Progress(what, begun=begun, moved=begun if moved is None else moved, **values)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seconds become hundredths."""
    monkeypatch.setattr(module, "FIRST_S", 0.05)
    monkeypatch.setattr(module, "TICK_S", 0.01)
    monkeypatch.setattr(module, "_every_s", 0.1)
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def wait_for(condition, limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {
                "total": 64,
                "unit": "responses",
                "amount_unit": "tok",
                "done": 37,
                "amount": 28_840,
                "note": "longest 3102",
            },
            "rollout.server: 37 of 64 responses, 412 tok/s, longest 3102, 51 s left",
        ),
        ({"total": 10, "unit": "files"}, "rollout.server: 0 of 10 files"),
        ({}, "rollout.server: 70 s so far"),
        ({"note": "last line: loading"}, "rollout.server: 70 s so far, last line: loading"),
        ({"done": 3, "unit": "prompts"}, "rollout.server: 3 prompts, 70 s so far"),
        ({"total": 4, "done": 4, "amount": 7e9, "amount_unit": "B"}, "rollout.server: 4 of 4, 100.0 MB/s, 0 s left"),
        ({"total": 4000, "done": 1}, "rollout.server: 1 of 4000, 77.8 h left"),
    ],
)
def test_a_progress_line_shows_count_speed_and_time_left(values, line):
    assert state(moved=69.0, **values).line(70.0) == line


def test_work_without_progress_for_half_a_minute_reports_that_instead_of_an_estimate():
    moving = state(moved=50.0, total=8, done=4, unit="responses")
    assert moving.line(79.0) == "rollout.server: 4 of 8 responses, 79 s left"
    assert moving.line(95.0) == "rollout.server: 4 of 8 responses, nothing new for 45 s"
    assert "nothing new" not in state(moved=0.0).line(95.0), "nothing is counted there"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99.4, "99 s"), (120, "2 min"), (5970, "1.7 h")])
def test_durations_are_shown_in_a_readable_unit(seconds, text):
    assert duration(seconds) == text


def test_work_that_ends_soon_logs_nothing(caplog):
    caplog.set_level(logging.INFO)
    with progress(LOG, "short") as found:
        found.advance()
    assert caplog.messages == []


@pytest.mark.usefixtures("quick")
def test_only_the_innermost_long_running_work_logs_progress(caplog):
    caplog.set_level(logging.INFO)
    with progress(LOG, "step"):
        with progress(LOG, "inner", total=2, unit="files") as inner:
            inner.advance()
            wait_for(lambda: any(message.startswith("inner: 1 of 2 files") for message in caplog.messages))
            assert activity() == "inner"
        wait_for(lambda: caplog.messages[-1].startswith("step: "))
        seen = len(caplog.messages)
        longest = 0.0
        for _ in range(30):  # each too short to log, together long enough
            begun = time.monotonic()
            with progress(LOG, "tiny"):
                time.sleep(0.01)
            longest = max(longest, time.monotonic() - begun)
    speakers = {message.partition(":")[0] for message in caplog.messages[seen:]}
    # on a busy machine a tiny one may have lasted long enough after all
    assert "step" in speakers and (speakers == {"step"} or longest >= module.FIRST_S)
    assert activity() == ""


@pytest.mark.usefixtures("quick")
def test_any_log_line_postpones_the_next_progress_line(caplog):
    caplog.set_level(logging.INFO)
    with progress(LOG, "step"):
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            module.heard()
            time.sleep(0.001)
    assert len(caplog.messages) <= 1, "at most where this process was stopped for longer than a tenth of a second"


@pytest.mark.usefixtures("quick")
def test_the_progress_thread_ends_with_its_block_even_after_an_error():
    with pytest.raises(RuntimeError), progress(LOG, "outer"), progress(LOG, "inner"):
        raise RuntimeError
    assert activity() == ""


def test_the_tick_count_grows_with_all_progress():
    before = ticks()
    with progress(LOG, "counting", total=3) as found:
        assert list(counted("abc", found)) == ["a", "b", "c"]
    assert found.done == 3 and ticks() >= before + 5


@pytest.mark.usefixtures("quick")
def test_ranks_other_than_zero_are_silent_unless_something_is_wrong():
    script = (
        "import logging, time; from tropd_mcore import logs, progress as p\n"
        "p.FIRST_S, p.TICK_S = 0.01, 0.01; p.report_every(0.02)\n"
        "logs.configure({rank}); log = logging.getLogger('tropd_mcore.x'); log.info('it begins')\n"
        "with p.progress(log, 'work'): time.sleep(0.5)\n"
        "log.warning('it is wrong')"
    )
    said = {}
    for rank in (0, 3):
        command = [sys.executable, "-c", script.format(rank=rank)]
        said[rank] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    assert "it begins" in said[0] and "work: " in said[0] and "W it is wrong" in said[0]
    assert [line.partition(" W ")[2] for line in said[3].splitlines()] == ["rank 3: it is wrong"]


def test_a_bar_shows_the_text_of_a_progress_line_and_is_wiped_at_the_end(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    bar = logs.Bar(terminal)
    work = state(total=64, unit="responses", amount_unit="tok", done=32, amount=28_840, note="longest 3102")
    bar.draw(work, 70.0)
    picture = terminal.getvalue().split("\r")[-1]
    for part in ("rollout.server:  50%", "32 of 64 responses", "412 tok/s, longest 3102"):
        assert part in picture, picture
    assert "\x1b[32m" in picture
    bar.clear(state())  # of other work: no effect
    assert terminal.getvalue().split("\r")[-1] == picture
    bar.clear(work)
    assert terminal.getvalue().split("\r")[-1] == "" and terminal.getvalue().split("\r")[-2].strip() == ""


def test_a_bar_has_no_colour_if_colours_are_switched_off(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    logs.Bar(terminal).draw(state(total=2, done=1), 70.0)
    assert "\x1b[" not in terminal.getvalue() and "1 of 2" in terminal.getvalue()


@pytest.mark.parametrize(
    ("term", "no_colour", "terminal", "colour"),
    [("xterm", "", True, True), ("xterm", "1", True, False), ("dumb", "", False, False), ("", "", False, False)],
)
def test_bars_are_shown_only_on_terminals_and_colours_only_if_wanted(monkeypatch, term, no_colour, terminal, colour):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("NO_COLOR", no_colour)
    assert (logs.is_terminal(Terminal()), logs.has_colour(Terminal())) == (terminal, colour)
    assert not logs.is_terminal(io.StringIO()) and not logs.has_colour(io.StringIO())


@pytest.mark.usefixtures("quick")
def test_log_lines_and_stdout_lines_do_not_mix_with_the_bar(monkeypatch):
    """All terminal output, in order: a line starts where the previous one ended or where the bar was wiped."""
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(module, "_display", None)
    for name in (*logs.OWN_LOGGERS, *logs.NOISY_LOGGERS):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "as it is restored")
    with warnings.catch_warnings():
        logs.configure()
    try:
        with progress(LOG, "work", total=5, unit="files") as work:
            wait_for(lambda: "0 of 5 files" in terminal.getvalue())
            print("from", "stdout")
            LOG.warning("from the log")
            work.advance()
            wait_for(lambda: "1 of 5 files" in terminal.getvalue())
    finally:
        module.report_on(None)
    text = terminal.getvalue()
    for line in ("from stdout", "from the log"):
        before = text[: text.index(line)].rpartition("\n")[2].split("\r")[-1]
        assert not before.strip() or before.endswith(" W "), repr(before)
        assert text[text.index(line) + len(line)] == "\n"
    assert text.rstrip(" \r").split("\r")[-1].strip() == "" or text.endswith("\r")


def test_control_characters_in_foreign_text_do_not_reach_the_terminal():
    assert logs.printable("last line: \x1b[2J\x07red\r\tend\n") == "last line: ?[2J?red?\tend\n"
    assert logs.printable("Devanagari क, 🎉") == "Devanagari क, 🎉"
