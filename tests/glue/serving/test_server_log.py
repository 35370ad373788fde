"""The log of a server: the lines that are shown, and its bounded size while the server writes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.glue.server_site import ServerSite, wait_for
from tropd_mcore.serving import log_file as log_module
from tropd_mcore.serving.log_file import ServerLog


def test_the_end_of_a_server_is_described_for_a_signal_for_silence_and_after_its_stop(site: ServerSite) -> None:
    process = site.started({"silent": True, "says": "started"})
    rest = f"; last line: 'started'; log: {site.log}"
    wait_for(lambda: "started" in site.log.read_text())
    assert process.describe_end() == f"rollout.server: the server runs but does not answer{rest}"
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not process.alive())
    assert process.describe_end() == f"rollout.server: the server was killed by signal 9{rest}"
    process.stop()
    assert process.describe_end() == f"rollout.server: the server ended with exit code None{rest}"


@pytest.mark.parametrize(
    ("says", "shown"),
    [
        ("one\n  two  \n\n   \n", "two"),
        ("one\nRuntimeError: first\nsglang.Exception: second\nthree\n", "sglang.Exception: second"),
        ("[12:00] it hit an exception: ValueError: bad\ntail", "[12:00] it hit an exception: ValueError: bad"),
        ("no exception: nothing to see", "no exception: nothing to see"),
        ("x" * 400, "x" * 300),
        ("OSError: too early\n" + "y" * log_module.TAIL_BYTES + "\nlast", "last"),
        ("   \n\n", ""),
    ],
)  # fmt: skip
def test_the_line_shown_from_a_log_is_the_last_exception_or_else_the_last_text(
    site: ServerSite, says: str, shown: str
) -> None:
    process = site.process()
    site.run_dir.mkdir()
    site.log.write_text(says)
    assert f"; last line: {shown!r}; log: " in process.describe_end()


def test_a_log_keeps_earlier_launches_and_none_of_their_lines_is_shown(site: ServerSite) -> None:
    site.run_dir.mkdir()
    site.log.write_text("ValueError: of an earlier launch\n")
    process = site.process({"exit": 1, "says": "of this one"})
    process.start()
    wait_for(lambda: not process.alive())
    assert "last line: 'of this one'" in process.describe_end()
    assert site.log.read_text() == "ValueError: of an earlier launch\nof this one\n"


WRITER = "i=0; while [ $i -lt 4000 ]; do i=$((i+1)); echo line $i; done"


def test_a_log_is_cut_while_the_server_writes_to_it_and_every_line_is_in_one_of_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "LOOK_EVERY_S", 3600.0)
    server_log = ServerLog(tmp_path / "rollout.log", 20_000)
    with server_log.open() as stream:
        writer = subprocess.Popen(["sh", "-c", WRITER + "; read go; echo last"], stdout=stream, stdin=subprocess.PIPE)
    path, older = tmp_path / "rollout.log", tmp_path / "rollout.log.1"
    wait_for(lambda: "line 4000" in path.read_text())
    assert server_log.rotate() and not server_log.rotate(), "what is small is left alone"
    assert path.read_text() == "" and older.read_text().splitlines()[-1] == "line 4000"
    writer.communicate(b"go\n")
    assert path.read_bytes() == b"last\n", "the server goes on at the start, without a hole"
    assert server_log.tail()[-2:] == ["line 4000", "last"]
    assert [file.stat().st_mode & 0o077 for file in (path, older)] == [0, 0]
    server_log.close()


def test_the_log_size_is_checked_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "LOOK_EVERY_S", 0.01)
    server_log = ServerLog(tmp_path / "rollout.log", 1000)
    with server_log.open() as stream:
        for number in range(3):
            stream.write(b"x" * 2000 + str(number).encode())
            stream.flush()
            wait_for(lambda: (tmp_path / "rollout.log").stat().st_size == 0)
    server_log.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rollout.log", "rollout.log.1"]
    assert (tmp_path / "rollout.log.1").read_bytes()[-1:] == b"2"


def test_the_last_line_is_found_even_if_the_log_was_cut_after_it(tmp_path: Path) -> None:
    """No line of an earlier launch is included, and a line at the cut stays one line."""
    path = tmp_path / "rollout.log"
    path.write_bytes(b"ValueError: of an earlier launch\n" * 2)
    server_log = ServerLog(path, 1000)
    with server_log.open() as stream:
        stream.write(b"x" * 2000 + b"\nRuntimeError: the ca")
        stream.flush()
        assert server_log.rotate()
        stream.write(b"use\n")
        stream.flush()
        assert server_log.tail() == ["x" * 2000, "RuntimeError: the cause"]
        stream.write(b"y" * 2000)
        stream.flush()
        assert server_log.rotate() and server_log.tail() == ["use", "y" * 2000]
    with server_log.open():
        assert server_log.tail() == [], "of this launch nothing is there yet"
    server_log.close()


def test_a_log_that_cannot_be_copied_is_reported_once_left_whole_and_cut_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log_module, "LOOK_EVERY_S", 0.01)
    copy, tries = shutil.copyfileobj, []

    def no_room(source: Any, target: Any, length: int) -> None:
        target.write(source.read(10))
        tries.append(1)
        if len(tries) < 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        source.seek(0)
        target.seek(0)
        copy(source, target, length)

    monkeypatch.setattr(shutil, "copyfileobj", no_room)
    server_log = ServerLog(tmp_path / "rollout.log", 1000)
    partial = tmp_path / "rollout.log.1.partial"
    with server_log.open() as stream:
        stream.write(b"x" * 2000)
        stream.flush()
        wait_for(lambda: (tmp_path / "rollout.log").stat().st_size == 0)
    server_log.close()
    assert not partial.exists() and (tmp_path / "rollout.log.1").read_bytes() == b"x" * 2000
    assert [message for message in caplog.messages if "No space left" in message] == [
        f"{tmp_path}/rollout.log: cannot be rotated yet (No space left on device); it keeps growing"
    ]


def test_a_large_log_of_an_earlier_launch_is_moved_away_at_the_start(site: ServerSite) -> None:
    site.run_dir.mkdir()
    site.log.write_text("old\n" * 1000)
    site.started({"silent": True, "says": "new"}, config={"log_max_mib": 0.001})
    wait_for(lambda: site.log.read_text() == "new\n")
    assert site.log.with_name("rollout.log.1").read_text() == "old\n" * 1000


def test_terminal_escapes_of_a_servers_log_are_shown_as_text(site: ServerSite) -> None:
    process = site.process()
    site.run_dir.mkdir()
    site.log.write_text("\x1b]0;owned\x07ok\x85error: fake\n")
    end = process.describe_end()
    assert end.isprintable() and "last line: 'error: fake'" in end
