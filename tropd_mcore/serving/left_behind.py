"""Removes files that killed processes left in shared memory and in the temporary folder.

SGLang and torch give their files random names and remove them when they exit normally. A killed process removes
nothing. So each of our processes that shares memory or starts a server keeps a ledger in /dev/shm, beside those files.
The ledger lists its processes, the files they have mapped and their temporary folders. The next launch reads the
ledgers and removes what ended processes left. This module does not clean run directories (see `records.run_dir`) and
does not stop processes (see `process`).

Invariant: a file is removed only if all of these hold. A ledger lists the file, or lists a process whose pid is in the
file's name. Every process of that ledger has ended (pid and start time). The file belongs to this user. No process maps
it or has it open. Files that no ledger covers stay. The rule about pids in names applies only if we see every process
of the machine, because containers may share /dev/shm and use the same pid for different processes.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from tropd_mcore.files import publish_text, remove_left_partials, writing

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
FOLDER_PREFIX = "tropd-server-"
LONGEST_BASE = 60
"""Longest path (characters) of the temporary folder: a socket's path has at most 107, and SGLang's must fit in it."""
_PROCESSES = Path("/proc")
_WHOLE_MACHINE = 0xEFFFFFFC
"""Number of the kernel's first process namespace (PROC_PID_INIT_INO), which contains all others."""
_CLOCK_STEP_S = 2.0
"""Tolerance when the start time of a process is compared with the time of a file."""
_LEDGER = re.compile(r"tropd\.(\d+)\.(\d+)\.(\d+)\.(\d+)\.json")
"""User id, process namespace, pid, start of that process in clock ticks since boot."""
_SHM_MANAGER_FOLDER = "torch-shm-dir-"
"""Prefix of the folder in which torch's shared-memory manager has its socket."""


@dataclass
class Ledger:
    """Processes, files and folders of one of our processes and of the processes that it started."""

    processes: dict[int, int] = field(default_factory=dict)
    """Pid -> start of the process, in clock ticks since boot"""
    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)

    def to_json(self) -> str:
        """Return the ledger as text; `from_json` is the inverse."""
        values = asdict(self)
        return json.dumps({**values, "files": sorted(self.files), "folders": sorted(self.folders)}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Read what `to_json` wrote. Raises ValueError, KeyError or TypeError if `text` is not a ledger."""
        values = json.loads(text)
        processes = {int(pid): int(start) for pid, start in values["processes"].items()}
        return cls(processes, {str(name) for name in values["files"]}, {str(name) for name in values["folders"]})


_own = Ledger()
_lock = threading.RLock()


def note_process(pid: int) -> None:
    """Record one of our processes, its children, and the shared memory that they have mapped so far.

    Call it again while the process works, to record what it maps later. Files older than the process are not its own
    and are not recorded. Calling it for a process that has ended does no harm.
    """
    with _lock:
        before = _own.to_json()
        since = _began(pid)
        for member in _family(pid):
            start = start_of(member)
            if start is not None:
                _own.processes[member] = start
                _own.files |= {name for name in mapped_files(member) if _changed(Path(name)) >= since - _CLOCK_STEP_S}
        if _own.to_json() != before:
            _write()


def note_sharing(manager: str | None = None, name: str | None = None) -> None:
    """Record that this process shares tensors.

    Call it without arguments before sharing, and again afterwards: `manager` is the socket of torch's shared-memory
    manager, `name` the file's name in shared memory. Raises DataError if the shared memory is full.
    """
    start = start_of(os.getpid())
    assert start is not None, "this process runs"
    with _lock:
        _own.processes[os.getpid()] = start
        if manager is not None and (folder := Path(manager).parent).name.startswith(_SHM_MANAGER_FOLDER):
            _own.folders.add(str(folder))
        if name is not None:
            _own.files.add(str(SHARED_MEMORY / name.removeprefix("/")))
        _write()


def make_folder() -> Path:
    """Make a temporary folder for a server and record it. Raises DataError if there is no room for it."""
    base = tempfile.gettempdir()
    base = base if len(base) <= LONGEST_BASE else "/tmp"
    with writing(Path(base), key="TMPDIR"):
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=base))
    with _lock:
        _own.folders.add(str(folder))
        _write()
    return folder


def remove_of(pids: Iterable[int], folder: Path | None) -> None:
    """Remove the files that these processes left, if they have ended, and the temporary folder made for them."""
    with _lock:
        gone = {pid for pid in pids if pid in _own.processes and start_of(pid) != _own.processes[pid]}
        if folder is not None:
            _remove_folder(folder)
            _own.folders.discard(str(folder))
        for pid in gone:
            del _own.processes[pid]
        _remove_files(_own.files | _named_after(gone))
        _own.files = {name for name in _own.files if Path(name).exists()}
        _write()


def remove_left_over() -> int:
    """Remove what ended processes of this user left on this machine. Return the number of files and folders."""
    removed = remove_left_partials(SHARED_MEMORY, f".tropd.{os.getuid()}.*")
    for path in sorted(SHARED_MEMORY.glob(f"tropd.{os.getuid()}.*.json")):
        ledger = _ledger_of_the_dead(path)
        if ledger is None:
            continue
        removed += len(_remove_files(ledger.files | _named_after(ledger.processes)))
        removed += sum(_remove_folder(Path(name)) for name in ledger.folders)
        if not any(Path(name).exists() for name in (*ledger.files, *ledger.folders)):
            with suppress(OSError):
                path.unlink()
    if removed:
        log.info(
            "removed %d files that killed processes had left in %s and the temporary folder", removed, SHARED_MEMORY
        )
    return removed


def start_of(pid: int) -> int | None:
    """Return the start of process `pid` in clock ticks since boot; None if it does not exist or is a zombie."""
    try:
        fields = (_PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def mapped_files(pid: int) -> set[str]:
    """Return the shared-memory files that a process has mapped; empty if it has ended or belongs to another user."""
    numbers = _mapped_numbers(pid)
    return {str(path) for path in SHARED_MEMORY.iterdir() if _number(path) in numbers} if numbers else set()


def _mapped_numbers(pid: int) -> set[int]:
    """Inode numbers of the shared memory that a process has mapped.

    Names would not do: a semaphore is mapped under a temporary name that it had only for a moment.
    """
    try:
        lines = (_PROCESSES / str(pid) / "maps").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {int(line.split(maxsplit=5)[4]) for line in lines if f" {SHARED_MEMORY}/" in line}


def _number(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except OSError:
        return None


def _began(pid: int) -> float:
    """Start of process `pid` in seconds since 1970; infinity if it has ended."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return math.inf


def _changed(path: Path) -> float:
    """Time of the file's last status change (ctime) in seconds since 1970; 0 if it is gone."""
    try:
        return path.lstat().st_ctime
    except OSError:
        return 0.0


def _family(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return [pid]


def _ledger_path() -> Path | None:
    """Path of this process's ledger; None if the machine has no /dev/shm."""
    start = start_of(os.getpid())
    if not SHARED_MEMORY.is_dir() or start is None:
        return None
    return SHARED_MEMORY / f"tropd.{os.getuid()}.{_namespace()}.{os.getpid()}.{start}.json"


def _namespace() -> int:
    """Number of the process namespace. Containers that share /dev/shm may use the same pids for other processes."""
    return (_PROCESSES / "self/ns/pid").stat().st_ino


def _write() -> None:
    """Write this process's ledger; if it is empty, delete the file."""
    path = _ledger_path()
    if path is None:
        return
    atexit.unregister(_forget)
    if not (_own.files or _own.folders or _own.processes):
        path.unlink(missing_ok=True)
        return
    atexit.register(_forget)
    publish_text(path, _own.to_json(), key="the size of /dev/shm (docker: --shm-size)")


def _forget() -> None:
    """Delete this process's ledger at a normal exit, when its files are gone or disappear with it.

    If a server's folder still exists, the ledger stays for the next launch.
    """
    path = _ledger_path()
    left = any(folder.name.startswith(FOLDER_PREFIX) and folder.exists() for folder in map(Path, _own.folders))
    if path is not None and not left:
        path.unlink(missing_ok=True)


def _ledger_of_the_dead(path: Path) -> Ledger | None:
    """The ledger at `path` if it belongs to this user and all its processes have ended; otherwise None."""
    name = _LEDGER.fullmatch(path.name)
    if name is None or int(name[2]) != _namespace() or start_of(int(name[3])) == int(name[4]):
        return None
    try:
        if path.lstat().st_uid != os.getuid():
            return None
        ledger = Ledger.from_json(path.read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    alive = any(start_of(pid) == start for pid, start in ledger.processes.items())
    return None if alive else ledger


def _named_after(pids: Iterable[int]) -> set[str]:
    """Shared-memory files that have one of these pids in their name, as torch's do.

    Empty in a container, where the same pid may belong to several processes.
    """
    if _namespace() != _WHOLE_MACHINE:
        return set()
    return {str(path) for pid in pids for path in SHARED_MEMORY.glob(f"torch_{pid}_*")}


def _remove_files(names: Iterable[str]) -> list[Path]:
    """Remove those files that belong to this user and that no process uses; return the removed ones."""
    paths = [path for name in names if _is_ours(path := Path(name)) and path.parent == SHARED_MEMORY]
    if not paths:
        return []
    used, removed = _used_numbers(), []
    for path in paths:
        if _number(path) not in used:
            with suppress(OSError):
                path.unlink()
                removed.append(path)
    return removed


def _remove_folder(folder: Path) -> bool:
    """Remove one of our temporary folders; return whether it existed."""
    if not folder.name.startswith((FOLDER_PREFIX, _SHM_MANAGER_FOLDER)) or not _is_ours(folder):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _is_ours(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid() and not path.is_symlink()
    except OSError:
        return False


def _used_numbers() -> set[int]:
    """Inode numbers of all shared memory that any process maps or has open, as far as this user may see."""
    used: set[int] = set()
    for entry in _PROCESSES.iterdir():
        if entry.name.isdecimal():
            used |= _mapped_numbers(int(entry.name))
            with suppress(OSError):
                for handle in (entry / "fd").iterdir():
                    with suppress(OSError):
                        if os.readlink(handle).startswith(f"{SHARED_MEMORY}/"):
                            used.add(handle.stat().st_ino)
    return used
