"""One job at a time in a run directory, and a job that notices when its directory is no longer its own.

A lock of the kernel (flock) goes with the process that holds it. Where the file system has none, or keeps it on one
machine, a file does the same: filelock's lease names host, process and its start, is touched by its holder, and is
taken over where that process is gone, or where nobody touches it any more. Not for commands that only read a run.

Invariant: who holds the directory has the lock file open, so no other file can have its number; a lock file that is
another one, or is not there, means that the directory was removed or replaced.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import filelock
import psutil

from tropd_mcore.errors import ConfigError, DataError, first_line
from tropd_mcore.files import UNSUPPORTED, shown
from tropd_mcore.progress import progress

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
HOLDER_FILE = ".lock.holder"
"""The lease: a file beside the lock file, there while a job without flock runs."""
LEASE_S = 120.0
"""A lease that nobody touches for so long is over."""
TOUCH_S = 15.0
FRESH_S = 3 * TOUCH_S
"""A lease that was touched in this time by the clock of the file system is held; nobody waits to see whether it is."""
TRY_S = 1.0
"""Time for two looks at a lease: the first may find it over, the second takes it."""
STAT_ATTEMPTS, STAT_PAUSE_S = 10, 1.0
"""How long an error of a file system may last that is not the absence of a file."""
WATCH_TRIES = 30
"""Seconds in which every node has to see what the first rank made."""
_ON_ONE_MACHINE = frozenset({"localflock", "local_lock=flock", "local_lock=all", "nolock"})
"""Mount options of Lustre and NFS with which flock keeps out the jobs of the same machine alone."""

Kind = Literal["auto", "flock", "file"]


class RunLock:
    """The hold of this process on a run directory; `release` gives it up, and so does the end of the process."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open = ExitStack()
        self._watched: dict[str, int] = {}
        """Name of each file that has to stay the same -> this process's descriptor of it"""
        self._lease: filelock.SoftFileLease | None = None

    def acquire(self, kind: Kind) -> None:
        """Make the directory and hold it.

        Raises ConfigError where it cannot be written, another job holds it, or the file system cannot do `kind`.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            descriptor = self._watch(LOCK_FILE, os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise ConfigError([_cannot_write(self._root, error)]) from error
        try:
            if self._flock(descriptor, kind) and not (self._root / HOLDER_FILE).exists():
                return
            self._take_lease()
        except BaseException:
            self.release()
            raise

    def watch(self) -> None:
        """Remember which directory this is without holding it, for the ranks that do not hold it.

        Raises ConfigError where the directory of the rank that holds it is not seen from here.
        """
        for attempt in range(WATCH_TRIES):
            try:
                self._watch(LOCK_FILE, os.O_RDONLY)
                return
            except FileNotFoundError as error:
                if attempt + 1 == WATCH_TRIES:
                    place = shown(self._root / LOCK_FILE)
                    problem = f"run.dir: {socket.gethostname()} does not see {place} of the first rank"
                    raise ConfigError([f"{problem}; choose a place on a file system that all nodes share"]) from error
                time.sleep(1.0)  # a network file system may know it a moment later
            except OSError as error:
                raise ConfigError([_cannot_write(self._root, error)]) from error

    def check(self) -> None:
        """Raise DataError where the directory was removed or replaced, or another job took it over. One `stat`."""
        if self._watched and not self._same(LOCK_FILE):
            raise DataError(
                f"run.dir: {shown(self._root)} was removed or replaced while this job ran in it; the job stops. Put it "
                "back and run the same command to go on, or run it again to begin anew"
            )
        if self._lease is None:
            return
        lost = self._lease.compromise is not None or not self._same(HOLDER_FILE)
        if lost and self._lease.compromise is None:
            time.sleep(1.0)  # who looks whether a lease is over moves its file away for a moment
            lost = not self._same(HOLDER_FILE)
        if lost:
            raise DataError(
                f"run.dir: this job lost {shown(self._root / HOLDER_FILE)}, which it has to touch every {LEASE_S:g} s, "
                "so another job may have taken the directory over; the job stops. Run the same command to go on"
            )

    def release(self) -> None:
        """Give the directory free; harmless where it is not held."""
        self._open.close()
        self._watched, self._lease = {}, None

    def _watch(self, name: str, flags: int) -> int:
        descriptor = os.open(self._root / name, flags, 0o644)
        self._open.callback(os.close, descriptor)
        self._watched[name] = descriptor
        return descriptor

    def _same(self, name: str) -> bool:
        there = _patient_stat(self._root / name)
        if there is None:
            return False
        held = os.fstat(self._watched[name])
        return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)

    def _flock(self, descriptor: int, kind: Kind) -> bool:
        """Whether a lock of the kernel holds the directory. A job with a lease takes one too, against those without."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError([_in_use(self._root, "")]) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise ConfigError([_cannot_write(self._root, error)]) from error
            reason = f"the file system has no flock ({error.strerror})"
        else:
            option = _local_option(self._root)
            if kind == "flock" or (kind == "auto" and option is None):
                return True
            reason = f"flock reaches this machine only (mount option {option})"
        if kind == "flock":
            raise ConfigError([f"run.lock=flock: {shown(self._root)}: {reason}; set run.lock to auto or file"])
        if kind == "auto":
            log.info("run.dir: %s; %s holds the directory instead", reason, self._root / HOLDER_FILE)
        return False

    def _take_lease(self) -> None:
        path = self._root / HOLDER_FILE
        lease = filelock.SoftFileLease(
            path, lease_duration=LEASE_S, heartbeat_interval=TOUCH_S, thread_local=False, poll_interval=0.25
        )
        try:
            before = lease.owner
            if not _acquired(lease, TRY_S):
                self._outwait(lease)
        except filelock.LeaseSettingsMismatch as error:
            reason = f" of another release ({first_line(error)}); if it is gone, remove {path}"
            raise ConfigError([_in_use(self._root, reason)]) from error
        except OSError as error:
            raise ConfigError([_cannot_write(self._root, error)]) from error
        if before is not None:
            log.warning(
                "run.dir: %s was left by process %d of %s, which is gone: this job takes the directory over",
                path,
                before.pid,
                before.hostname,
            )
        self._open.callback(lease.release)
        self._watch(HOLDER_FILE, os.O_RDONLY)
        self._lease = lease

    def _outwait(self, lease: filelock.SoftFileLease) -> None:
        """Wait until a lease is over that was not touched lately. Raises ConfigError where it is held."""
        path, owner = self._root / HOLDER_FILE, lease.owner
        holder = f"process {owner.pid} of {owner.hostname}" if owner is not None else "another job"
        age = _untouched_s(path)
        if age >= FRESH_S:
            what = f"run.dir: {holder} has not touched {path} for {age:.0f} s; it has {LEASE_S:g} s to do so"
            with progress(log, what):
                if _acquired(lease, LEASE_S + 2 * TOUCH_S):
                    return
            age = _untouched_s(path)
        raise ConfigError([_in_use(self._root, f" ({holder}, last sign of life {age:.0f} s ago)")])


def _patient_stat(path: Path) -> os.stat_result | None:
    """What `os.stat` says, None where nothing is there; another error may be one of a network for a moment.

    Raises DataError where it stays.
    """
    for attempt in range(STAT_ATTEMPTS):
        try:
            return os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if attempt == STAT_ATTEMPTS - 1:
                raise DataError(f"run.dir: {path} cannot be looked at: {error.strerror}; the job stops") from error
            time.sleep(STAT_PAUSE_S)
    raise AssertionError("unreachable")


def _acquired(lease: filelock.SoftFileLease, timeout_s: float) -> bool:
    try:
        lease.acquire(timeout=timeout_s)
    except filelock.Timeout:
        return False
    return True


def _untouched_s(path: Path) -> float:
    """Seconds since `path` was touched, both times by the clock of its file system. Raises OSError."""
    probe = path.with_name(f".clock.{os.getpid()}.partial")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - path.stat().st_mtime)
    except FileNotFoundError:  # given free a moment ago
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _local_option(root: Path) -> str | None:
    """The mount option that keeps locks under `root` on this machine; None where there is none."""
    place = root.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    options = max(mounts, key=lambda part: len(part.mountpoint)).opts.split(",") if mounts else []
    return next((option for option in options if option in _ON_ONE_MACHINE), None)


def _in_use(root: Path, by: str) -> str:
    return f"run.dir: {shown(root)} is in use by another job{by}; stop it or set another run.dir"


def _cannot_write(root: Path, error: OSError) -> str:
    return f"run.dir: cannot write {shown(root)}: {error.strerror}; choose another run.dir"
