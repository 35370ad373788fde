"""Allows one job at a time in a run directory, and tells a job if its directory was removed, replaced or taken over.

The kernel's file lock (flock) ends with the process that holds it. If the file system has no flock, or applies it only
within one machine, a lease file is used instead. This lease (of the package filelock) names host, process and process
start. Its holder touches it regularly. Another job takes it over if that process is gone or stops touching it. Commands
that only read a run need no lock.

Invariant: the holder keeps the lock file open, so no other file can get its inode number. If the lock file is missing
or has another inode number, the directory was removed or replaced.
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
"""The lease file beside the lock file. It exists while a job without flock runs."""
LEASE_S = 120.0
"""A lease expires if it is not touched for this time."""
TOUCH_S = 15.0
FRESH_S = 3 * TOUCH_S
"""A lease touched within this time, by the clock of the file system, counts as held without waiting."""
TRY_S = 1.0
"""Time for two attempts to take a lease: the first may find it expired, the second takes it."""
STAT_ATTEMPTS, STAT_PAUSE_S = 10, 1.0
"""Attempts, and seconds between them, before a file system error other than a missing file is raised."""
WATCH_TRIES = 30
"""Seconds within which every node must see the lock file that the first rank created."""
_ON_ONE_MACHINE = frozenset({"localflock", "local_lock=flock", "local_lock=all", "nolock"})
"""Mount options of Lustre and NFS with which flock excludes only jobs of the same machine."""

Kind = Literal["auto", "flock", "file"]


class RunLock:
    """The lock of this process on a run directory. `release`, or the end of the process, gives it up."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open = ExitStack()
        self._watched: dict[str, int] = {}
        """Name of each file that must stay the same -> open file descriptor"""
        self._lease: filelock.SoftFileLease | None = None

    def acquire(self, kind: Kind) -> None:
        """Create the directory and lock it.

        Raises ConfigError if it cannot be written, another job holds it, or the file system does not support `kind`.
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
        """Remember which directory this is, on a rank that does not hold the lock.

        Raises ConfigError if this machine does not see the directory of the rank that holds the lock.
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
                time.sleep(1.0)  # a network file system may show the file a moment later
            except OSError as error:
                raise ConfigError([_cannot_write(self._root, error)]) from error

    def check(self) -> None:
        """Raise DataError if the directory was removed or replaced, or another job took it over. Costs one `stat`."""
        if self._watched and not self._same(LOCK_FILE):
            raise DataError(
                f"run.dir: {shown(self._root)} was removed or replaced while this job ran in it; the job stops. Put it "
                "back and run the same command to go on, or run it again to begin anew"
            )
        if self._lease is None:
            return
        lost = self._lease.compromise is not None or not self._same(HOLDER_FILE)
        if lost and self._lease.compromise is None:
            time.sleep(1.0)  # a process that checks whether a lease has expired moves the file away for a moment
            lost = not self._same(HOLDER_FILE)
        if lost:
            raise DataError(
                f"run.dir: this job lost {shown(self._root / HOLDER_FILE)}, which it must touch every {LEASE_S:g} s, "
                "so another job may have taken the directory over; the job stops. Run the same command to resume"
            )

    def release(self) -> None:
        """Release the directory. Does nothing if it is not held."""
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
        """Take flock; returns whether it is enough to hold the directory.

        A job that uses a lease takes flock too, to exclude jobs that use only flock.
        """
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
            reason = f"flock excludes only jobs of this machine (mount option {option})"
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
        """Wait until a lease that was not touched lately expires. Raises ConfigError if the lease is held."""
        path, owner = self._root / HOLDER_FILE, lease.owner
        holder = f"process {owner.pid} of {owner.hostname}" if owner is not None else "another job"
        age = _untouched_s(path)
        if age >= FRESH_S:
            what = f"run.dir: {holder} has not touched {path} for {age:.0f} s; its lease ends after {LEASE_S:g} s"
            with progress(log, what):
                if _acquired(lease, LEASE_S + 2 * TOUCH_S):
                    return
            age = _untouched_s(path)
        raise ConfigError([_in_use(self._root, f" ({holder}, last sign of life {age:.0f} s ago)")])


def _patient_stat(path: Path) -> os.stat_result | None:
    """Return `os.stat` of `path`; None if nothing is there. Other errors may be short network failures and are retried.

    Raises DataError if they persist.
    """
    for attempt in range(STAT_ATTEMPTS):
        try:
            return os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if attempt == STAT_ATTEMPTS - 1:
                raise DataError(f"run.dir: {path} cannot be checked: {error.strerror}; the job stops") from error
            time.sleep(STAT_PAUSE_S)
    raise AssertionError("unreachable")


def _acquired(lease: filelock.SoftFileLease, timeout_s: float) -> bool:
    try:
        lease.acquire(timeout=timeout_s)
    except filelock.Timeout:
        return False
    return True


def _untouched_s(path: Path) -> float:
    """Return the seconds since `path` was touched, by the clock of its file system alone. Raises OSError."""
    probe = path.with_name(f".clock.{os.getpid()}.partial")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - path.stat().st_mtime)
    except FileNotFoundError:  # released a moment ago
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _local_option(root: Path) -> str | None:
    """Return the mount option that limits locks under `root` to this machine; None if there is none."""
    place = root.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    options = max(mounts, key=lambda part: len(part.mountpoint)).opts.split(",") if mounts else []
    return next((option for option in options if option in _ON_ONE_MACHINE), None)


def _in_use(root: Path, by: str) -> str:
    return f"run.dir: {shown(root)} is in use by another job{by}; stop it or set another run.dir"


def _cannot_write(root: Path, error: OSError) -> str:
    return f"run.dir: cannot write {shown(root)}: {error.strerror}; choose another run.dir"
