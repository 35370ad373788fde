"""The record of a started server on disk: who runs it, and whether an earlier launch left it behind.

Not for starting (see `process`) and not for files in shared memory (see `left_behind`). Invariants: a server is stopped
only where its pid and its start time both match the record, and only once the process that started it is gone; nothing
is ever stopped by name; a record holds no key.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tropd_mcore.errors import ServerError
from tropd_mcore.files import publish_text
from tropd_mcore.foreign_text import one_line

log = logging.getLogger(__name__)

STOP_GRACE_S = 2.0
"""A server holds nothing that is worth a longer wait; by itself it takes about 5 s."""
STOP_TIMEOUT_S = 30.0
SAME_START_S = 1.0


@dataclass(frozen=True)
class ServerRecord:
    """A started server: its process group, and the process that started it. Start times are seconds since 1970."""

    pid: int
    start_time: float
    port: int
    owner_pid: int
    owner_start_time: float
    host: str

    def save(self, path: Path) -> None:
        """Write the record, readable by this user alone. Raises DataError where that is impossible."""
        publish_text(path, json.dumps(asdict(self)) + "\n")
        path.chmod(0o600)

    def is_here(self) -> bool:
        """Whether it is of this host; pids of another host say nothing."""
        return self.host == socket.gethostname()

    def runs(self) -> bool:
        """Whether the server's process is still the one that was started."""
        return self.is_here() and _is(self.pid, self.start_time) and _leads_group(self.pid)

    def live_owner(self) -> int | None:
        """Pid of the process that started it, where that lives and is not this one."""
        mine = self.owner_pid == os.getpid()
        return self.owner_pid if self.is_here() and not mine and _is(self.owner_pid, self.owner_start_time) else None


def make_record(pid: int, port: int) -> ServerRecord:
    """Return the record of a server that this process has started."""
    owner = psutil.Process()
    started = psutil.Process(pid).create_time()
    return ServerRecord(pid, started, port, owner.pid, owner.create_time(), socket.gethostname())


def read_record(path: Path) -> ServerRecord | None:
    """Return the record in `path`; None where there is none, with a warning where it cannot be read."""
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

    `key` is the section of the server, for messages. Raises ServerError where the owner lives: that server is in use.
    """
    record = read_record(path)
    if record is None:
        return False
    if not record.runs():
        return False
    owner = record.live_owner()
    if owner is not None:
        raise ServerError(
            f"{key}: {path} is of a server (pid {record.pid}) that process {owner} ({command_of(owner)}) uses: "
            "wait until that has ended, or take another run.dir"
        )
    log.warning("stopping the server with pid %d that an earlier launch left behind (%s)", record.pid, path)
    stop_group(record.pid)
    path.unlink(missing_ok=True)
    return True


def is_in_use(path: Path) -> bool:
    """Return whether `path` is the record of a server of another live process, or may be: one of another host."""
    record = read_record(path)
    return record is not None and (not record.is_here() or record.live_owner() is not None)


def stop_group(group: int) -> None:
    """SIGTERM to the leader, at most STOP_GRACE_S to wind up, then SIGKILL to the whole group that was made for it.

    Its children get no SIGTERM: SGLang takes a child that ends by itself for a crash and waits to diagnose it. A group
    with a stopped process is killed at once, since that one cannot wind up. So is what a leader that is gone has left.
    """
    members = group_members(group)
    if psutil.pid_exists(group) and stopped_member(group) is None:
        with suppress(ProcessLookupError):
            os.kill(group, signal.SIGTERM)
        psutil.wait_procs(members, timeout=STOP_GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    psutil.wait_procs(members, timeout=STOP_TIMEOUT_S)


def stopped_member(group: int) -> str | None:
    """Return which process of the group is stopped (SIGSTOP), in words; None where none is."""
    for process in group_members(group):
        try:
            if process.status() == psutil.STATUS_STOPPED:
                which = "its process" if process.pid == group else "a process of it"
                return f"{which} ({process.pid}) is stopped (state T)"
        except psutil.NoSuchProcess:
            continue
    return None


def group_members(group: int) -> list[psutil.Process]:
    """Return the leader and what it has started, and who is in its group where the leader is gone."""
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
