"""Holding a run directory: with flock, without it, on another machine, and the reaction of a job that loses it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.records import run_lock
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.records.run_lock import HOLDER_FILE, LOCK_FILE, RunLock

IN_USE = r"^run\.dir: .* is in use by another job.*; stop it or set another run\.dir$"
NO_FLOCK = [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL]


def refuse(number: int) -> Callable[[int, int], None]:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system like Lustre without `-o flock`."""
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOSYS))


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of two seconds, so that a test may wait for the end of one."""
    monkeypatch.setattr(run_lock, "LEASE_S", 2.0)
    monkeypatch.setattr(run_lock, "TOUCH_S", 0.5)
    monkeypatch.setattr(run_lock, "FRESH_S", 1.5)


def held(root: Path, kind: run_lock.Kind = "auto") -> RunLock:
    return RunDir(root).lock(kind)


def killed_holder(root: Path) -> int:
    """A process that held the directory by a lock file and was killed. Returns its pid."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tropd_mcore.records.run_dir import RunDir\n"
        "run_dir = RunDir(Path(sys.argv[1]))\n"
        "run_dir.lock('file')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(root)])
    process.wait(timeout=300)
    return process.pid


def move_to_another_machine(root: Path, *, untouched_s: float) -> None:
    """Make the lease in `root` belong to another machine, which touched it this many seconds ago."""
    path = root / HOLDER_FILE
    text = path.read_text().replace(f"host={os.uname().nodename}", "host=elsewhere")
    assert "host=elsewhere" in text
    path.write_text(text)
    os.utime(path, (time.time() - untouched_s,) * 2)


@pytest.mark.parametrize("number", NO_FLOCK, ids=errno.errorcode.get)
def test_without_flock_a_lock_file_keeps_others_out_which_is_logged_in_one_line(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with caplog.at_level(logging.INFO):
        lock = held(tmp_path)
    (line,) = [record.message for record in caplog.records]
    assert "has no flock" in line and HOLDER_FILE in line and "\n" not in line
    with pytest.raises(ConfigError, match=rf"{IN_USE[:-1]}") as caught:
        held(tmp_path)
    assert f"process {os.getpid()} of " in str(caught.value) and "\n" not in str(caught.value)
    lock.check()
    lock.release()
    assert not (tmp_path / HOLDER_FILE).exists()
    held(tmp_path).release()


def test_a_requested_lock_that_is_not_available_gives_a_one_line_error(tmp_path: Path, no_flock: None) -> None:
    with pytest.raises(ConfigError, match=r"^run\.lock=flock: .*no flock .*; set run\.lock to auto or file$"):
        held(tmp_path, "flock")


@pytest.mark.parametrize("kinds", [("flock", "file"), ("file", "flock"), ("auto", "file"), ("file", "auto")], ids=str)
def test_a_job_with_flock_and_one_with_a_lock_file_keep_each_other_out(
    tmp_path: Path, kinds: tuple[run_lock.Kind, run_lock.Kind]
) -> None:
    first = held(tmp_path, kinds[0])
    with pytest.raises(ConfigError, match=IN_USE):
        held(tmp_path, kinds[1])
    first.release()
    held(tmp_path, kinds[1]).release()


def test_the_lock_file_of_a_job_without_flock_keeps_out_a_job_with_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse(errno.ENOSYS))
        first = held(tmp_path)
    with pytest.raises(ConfigError, match=IN_USE):
        held(tmp_path, "flock")
    first.release()


def test_the_lock_file_of_a_killed_job_on_this_machine_is_taken_over_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pid = killed_holder(tmp_path)
    assert (tmp_path / HOLDER_FILE).exists()
    with caplog.at_level(logging.WARNING):
        lock = held(tmp_path, "file")
    (line,) = [record.message for record in caplog.records]
    assert f"left by process {pid} of " in line and "takes the directory over" in line
    lock.check()
    lock.release()


def test_a_lock_file_recently_touched_by_another_machine_is_refused_at_once(tmp_path: Path) -> None:
    killed_holder(tmp_path)
    move_to_another_machine(tmp_path, untouched_s=10.0)
    with pytest.raises(ConfigError, match=r"process \d+ of elsewhere, last sign of life \d+ s ago"):
        held(tmp_path, "file")


def test_a_lock_file_no_longer_touched_by_another_machine_is_taken_over(
    tmp_path: Path, short_lease: None, caplog: pytest.LogCaptureFixture
) -> None:
    first = held(tmp_path, "file")
    text = (tmp_path / HOLDER_FILE).read_text()
    first.release()
    (tmp_path / HOLDER_FILE).write_text(text)
    move_to_another_machine(tmp_path, untouched_s=100.0)
    with caplog.at_level(logging.WARNING):
        lock = held(tmp_path, "file")
    assert "of elsewhere, which is gone" in caplog.text
    lock.check()
    lock.release()


def test_a_mount_with_machine_local_locks_uses_a_lock_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def mounts(all: bool) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(mountpoint="/", opts="rw,nolock"),
            SimpleNamespace(mountpoint=str(tmp_path), opts="rw,localflock,lazystatfs"),
        ]

    monkeypatch.setattr(run_lock.psutil, "disk_partitions", mounts)
    with caplog.at_level(logging.INFO):
        lock = held(tmp_path / "run")
    assert "flock excludes only jobs of this machine (mount option localflock)" in caplog.text
    assert (tmp_path / "run" / HOLDER_FILE).exists()
    lock.release()
    held(tmp_path / "run", "flock").release()
    assert not (tmp_path / "run" / HOLDER_FILE).exists()


@pytest.mark.parametrize("kind", ["flock", "file"])
@pytest.mark.parametrize("how", ["removed", "moved", "replaced", "lock removed", "lock replaced"])
def test_a_job_whose_run_directory_disappears_stops_with_one_line(
    tmp_path: Path, how: str, kind: run_lock.Kind
) -> None:
    root = tmp_path / "run"
    run_dir, other = RunDir(root), RunDir(root)
    lock = run_dir.lock(kind)
    other.watch()
    for each in (run_dir, other):
        each.check_held()
    if how.startswith("lock"):
        (root / LOCK_FILE).unlink()
        if how == "lock replaced":
            (root / LOCK_FILE).touch()
    elif how == "moved":
        root.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(root)
        if how == "replaced":
            held(root).release()
    for each in (run_dir, other):
        with pytest.raises(DataError, match=r"^run\.dir: .*run was removed or replaced while this job ran"):
            each.check_held()
    lock.release()
    run_dir.check_held()


def test_a_job_whose_lock_file_was_taken_over_stops(tmp_path: Path, no_flock: None) -> None:
    lock = held(tmp_path)
    (tmp_path / HOLDER_FILE).unlink()
    (tmp_path / HOLDER_FILE).write_text("of another job")
    with pytest.raises(DataError, match=r"this job lost .*\.lock\.holder"):
        lock.check()
    lock.release()
    assert (tmp_path / HOLDER_FILE).read_text() == "of another job"


def test_a_rank_that_does_not_see_the_run_directory_of_rank_0_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "WATCH_TRIES", 1)
    with pytest.raises(ConfigError, match=r"run\.dir: \S+ does not see .*; choose a place on a file system that all"):
        RunDir(tmp_path / "of-another-node").watch()


def test_a_directory_that_cannot_hold_a_lease_gives_a_one_line_error(
    tmp_path: Path, no_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_lock, "_acquired", full)
    with pytest.raises(ConfigError, match=r"^run\.dir: cannot write .*: No space left on device; choose another"):
        held(tmp_path)
