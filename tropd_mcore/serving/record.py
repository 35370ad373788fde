"""The on-disk record of a started server: which process owns it, and whether an earlier launch left it behind.

This module does not start servers (see `process`) and does not clean up shared memory (see `left_behind`). Invariants:
a left-over server is stopped only if its pid and its start time match the record and the process that started it is
gone. Processes are never stopped by name. A record holds no key.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path

import psutil

from tropd_mcore.errors import ServerError
from tropd_mcore.files import publish_text
from tropd_mcore.foreign_text import one_line

log = logging.getLogger(__name__)

STOP_GRACE_S = 2.0
"""Time between SIGTERM and SIGKILL. A server has nothing to save that needs longer; it takes about 5 s by itself."""
STOP_TIMEOUT_S = 30.0
SAME_START_S = 1.0


@dataclass(frozen=True)
class ServerRecord:
    """A started server and the process that started it (its owner). Start times are in seconds since 1970."""

    pid: int
    start_time: float
    port: int
    owner_pid: int
    owner_start_time: float
    host: str

    def save(self, path: Path) -> None:
        """Write the record, readable by this user only. Raises DataError if that fails."""
        publish_text(path, json.dumps(asdict(self)) + "\n")
        path.chmod(0o600)

    def is_here(self) -> bool:
        """Whether the record was written on this host. Pids of another host have no meaning here."""
        return self.host == socket.gethostname()

    def runs(self) -> bool:
        """Whether the recorded process still runs (same pid and start time)."""
        return self.is_here() and _is(self.pid, self.start_time) and _leads_group(self.pid)

    def live_owner(self) -> int | None:
        """Pid of the process that started the server, if it lives and is not this process; otherwise None."""
        mine = self.owner_pid == os.getpid()
        return self.owner_pid if self.is_here() and not mine and _is(self.owner_pid, self.owner_start_time) else None


def make_record(pid: int, port: int) -> ServerRecord:
    """Return the record of a server that this process started."""
    owner = psutil.Process()
    started = psutil.Process(pid).create_time()
    return ServerRecord(pid, started, port, owner.pid, owner.create_time(), socket.gethostname())


def read_record(path: Path) -> ServerRecord | None:
    """Return the record in `path`; None if there is no such file, or, with a warning, if it cannot be read."""
    try:
        found = json.loads(path.read_text())
        return ServerRecord(
            pid=int(found["pid"]),
            start_time=float(found["start_time"]),
            port=int(found["port"]),
            owner_pid=int(found["owner_pid"]),
            owner_start_time=float(found["owner_start_time"]),
            host=str(found["host"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: not a server record (%s); ignored", path, one_line(repr(error), 100))
        return None


def stop_left_over(path: Path, *, key: str) -> bool:
    """Stop the server that the record in `path` describes if its owner is gone; return whether one was stopped.

    `key` is the server's configuration section, for messages. Raises ServerError if the owner lives, because then the
    server is in use.
    """
    record = read_record(path)
    if record is None:
        return False
    if not record.runs():
        return False
    owner = record.live_owner()
    if owner is not None:
        raise ServerError(
            f"{key}: {path} is the record of a server (pid {record.pid}) that process {owner} ({command_of(owner)}) "
            "uses: wait until that process has ended, or choose another run.dir"
        )
    log.warning("stopping the server with pid %d that an earlier launch left behind (%s)", record.pid, path)
    stop_group(record.pid)
    path.unlink(missing_ok=True)
    return True


def is_in_use(path: Path) -> bool:
    """Return whether another live process owns the server of this record. A record of another host counts as in use."""
    record = read_record(path)
    return record is not None and (not record.is_here() or record.live_owner() is not None)


def stop_group(group: int) -> None:
    """Send SIGTERM to the group's leader, wait at most STOP_GRACE_S, then send SIGKILL to the whole group.

    The children get no SIGTERM, because SGLang treats a child that ends by itself as a crash and waits to diagnose it.
    If a process of the group is stopped (SIGSTOP), it cannot shut down, so the group is killed at once. The same holds
    if the leader is already gone.
    """
    members = group_members(group)
    if psutil.pid_exists(group) and stopped_member(group) is None:
        with suppress(ProcessLookupError):
            os.kill(group, signal.SIGTERM)
        psutil.wait_procs(members, timeout=STOP_GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    psutil.wait_procs(members, timeout=STOP_TIMEOUT_S)


def how_it_ended(process: subprocess.Popen[bytes] | None, stopped: str | None) -> str:
    """Return what became of a process that gives no answer. `stopped` is what `stopped_member` says of its group."""
    code = None if process is None else process.poll()
    if process is not None and code is None:
        return "runs but does not answer" + (f": {stopped}" if stopped else "")
    return f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"


def stopped_member(group: int) -> str | None:
    """Return a phrase that names the stopped (SIGSTOP) process of the group; None if none is stopped."""
    for process in group_members(group):
        try:
            if process.status() == psutil.STATUS_STOPPED:
                which = "its process" if process.pid == group else "a process of it"
                return f"{which} ({process.pid}) is stopped (state T)"
        except psutil.NoSuchProcess:
            continue
    return None


def group_members(group: int) -> list[psutil.Process]:
    """Return the leader and its descendants. If the leader is gone, return the processes in its group."""
    try:
        leader = psutil.Process(group)
        return [leader, *leader.children(recursive=True)]
    except psutil.NoSuchProcess:
        return [process for process in psutil.process_iter() if _group_of(process.pid) == group]


def command_of(pid: int) -> str:
    """Return the beginning of the command line of a process, for messages."""
    try:
        return one_line(" ".join(psutil.Process(pid).cmdline()), 80) or "no command line"
    except psutil.Error:
        return "its command line cannot be read"


def _is(pid: int, start_time: float) -> bool:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - start_time) <= SAME_START_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _leads_group(pid: int) -> bool:
    return _group_of(pid) == pid


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def free_name(logs: Path, name: str) -> str:
    """Return the first of `name`, `name-2`, `name-3`, ... whose record in `logs` belongs to no other live process."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(each for each in names if not is_in_use(logs / f"{each}.server.json"))
