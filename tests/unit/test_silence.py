"""The tool that measures silences, on commands whose silences are known."""

import signal
import sys

import pytest

from tests.faults.silence import Order, Reader, Said, main, watch


def python(script: str) -> list[str]:
    return [sys.executable, "-u", "-c", script]


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_are_recorded_with_their_times_and_the_longest_silence_is_found(terminal):
    said = watch(
        python("import time; print('one'); time.sleep(1.5); print('two'); raise SystemExit(3)"), terminal=terminal
    )
    assert [line for _, line in said.lines] == ["one", "two"] and said.code == 3
    silence, at = said.longest()
    assert silence >= 1.4 and at in said.times[:3]


def test_a_command_that_says_nothing_is_silent_for_all_of_its_time():
    said = watch(python("import time; time.sleep(1)"))
    assert said.longest() == (said.seconds, 0.0) and said.first_s() == said.seconds


def test_a_progress_bar_ends_a_silence_and_is_recorded_once_per_interval():
    said = Said(seconds=40.0)
    reader = Reader(said)
    for tenth in range(400):
        reader.feed(f"\r\x1b[32mwork: {tenth}\x1b[0m".encode(), tenth / 10)
    reader.feed(b"\r        \rdone\r\n", 40.0)
    assert said.longest()[0] < 0.2
    assert [line for _, line in said.lines] == ["~ work: 0", "~ work: 100", "~ work: 200", "~ work: 300", "done"]


def test_a_progress_bar_that_was_wiped_is_not_recorded():
    said = Said(seconds=2.0)
    reader = Reader(said)
    reader.feed(b"before\r\n\rwork: 1\r       \r", 1.0)
    reader.close(2.0)
    assert [line for _, line in said.lines] == ["before"]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", -signal.SIGTERM)])
def test_a_signal_is_sent_after_a_given_text_appears(name, code):
    script = (
        "import time\ntry:\n print('ready')\n time.sleep(60)\nexcept KeyboardInterrupt:\n"
        " print('interrupted')\n raise SystemExit(130)"
    )
    said = watch(python(script), orders=[Order.parse(f"{name}:ready")])
    assert said.code == code and said.seconds < 50
    assert f"<- {name}" in said.text(["command"])


def test_an_output_held_open_by_another_process_does_not_block_the_tool():
    said = watch(
        python("import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'])")
    )
    assert said.seconds < 19 and "another process still holds its output" in said.lines[-1][1]


def test_a_silence_above_the_limit_exits_with_1_and_the_output_is_written_to_the_file(tmp_path, capsys):
    out = tmp_path / "new" / "text.txt"
    command = ["--out", str(out), "--", *python("import time; time.sleep(1); print('late')")]
    assert main(["--limit", "0.5", *command]) == 1 and main(["--limit", "300", *command]) == 0
    assert "late" in out.read_text() and "longest silence" in capsys.readouterr().out
