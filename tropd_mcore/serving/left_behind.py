"""What a killed process leaves in shared memory and in the temporary folder, and its removal by the next one.

SGLang and torch name their files at random and remove them when they end by themselves; a process that is killed
removes nothing. So each process of ours that shares memory or starts a server keeps a ledger beside those files, in
/dev/shm: which processes are its own, which files they have mapped, which folder is theirs. Not for files of a run
directory (`records.run_dir`) or for stopping processes (`process`).

Invariant: a file is removed only where a ledger names it, or names the process whose number it carries, every process
of that ledger is gone (number and start time), the file is ours by its owner, and no process maps it or has it open.
What no ledger knows stays. The number counts only where we see every process of the machine: containers may share
/dev/shm and each have a process of that number.
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
"""Characters of a temporary folder in which SGLang's sockets have room: a socket's path has at most 107."""
_PROCESSES = Path("/proc")
_WHOLE_MACHINE = 0xEFFFFFFC
"""Number of the process namespace that the kernel starts with (PROC_PID_INIT_INO), which holds all others."""
_CLOCK_STEP_S = 2.0
"""By how much the start of a process and the time of a file may disagree."""
_LEDGER = re.compile(r"tropd\.(\d+)\.(\d+)\.(\d+)\.(\d+)\.json")
"""Owner, process namespace, process, start of it in clock ticks since the machine started."""
_SHM_MANAGER_FOLDER = "torch-shm-dir-"
"""Where torch's manager of shared memory has its socket."""


@dataclass
class Ledger:
    """What belongs to one process of ours and to the processes that it started."""

    processes: dict[int, int] = field(default_factory=dict)
    """Process -> its start, in clock ticks"""
    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)

    def to_json(self) -> str:
        """The ledger as text; `from_json` is the inverse."""
        values = asdict(self)
        return json.dumps({**values, "files": sorted(self.files), "folders": sorted(self.folders)}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Raises ValueError, KeyError or TypeError where `text` is no ledger."""
        values = json.loads(text)
        processes = {int(pid): int(start) for pid, start in values["processes"].items()}
        return cls(processes, {str(name) for name in values["files"]}, {str(name) for name in values["folders"]})


_own = Ledger()
_lock = threading.RLock()


def note_process(pid: int) -> None:
    """Record a process of ours, and what it and its children have mapped of shared memory until now.

    To be called again while it works: what it maps later is not known before. What is older than the process is not
    its own, and stays. Harmless where it has ended.
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
    """Record that this process is about to share tensors; once it does, the socket of torch's manager and the file.

    `name` is the file's name in shared memory. Raises DataError where the shared memory is full.
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
    """Make a temporary folder for a server, recorded as ours. Raises DataError where there is no room for it."""
    base = tempfile.gettempdir()
    base = base if len(base) <= LONGEST_BASE else "/tmp"
    with writing(Path(base), key="TMPDIR"):
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=base))
    with _lock:
        _own.folders.add(str(folder))
        _write()
    return folder


def remove_of(pids: Iterable[int], folder: Path | None) -> None:
    """Remove what these processes, which have ended, left behind, and the folder that was made for them."""
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
    """Remove what ended processes of this user have left on this machine; return how many files and folders."""
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
    """When process `pid` started, in clock ticks since the machine did; None where there is none, or a zombie."""
    try:
        fields = (_PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def mapped_files(pid: int) -> set[str]:
    """The files of shared memory that a process has mapped; none where it has ended or is not ours."""
    numbers = _mapped_numbers(pid)
    return {str(path) for path in SHARED_MEMORY.iterdir() if _number(path) in numbers} if numbers else set()


def _mapped_numbers(pid: int) -> set[int]:
    """Numbers (inodes) of what a process has mapped of shared memory.

    Not names: a semaphore is mapped under a name that it had for a moment only.
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
    """When process `pid` started, in seconds since 1970; for ever later where it has ended."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return math.inf


def _changed(path: Path) -> float:
    """When the file was made or its state changed last, in seconds since 1970; 0 where it is gone."""
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
    """The ledger of this process; None where the machine has no shared memory."""
    start = start_of(os.getpid())
    if not SHARED_MEMORY.is_dir() or start is None:
        return None
    return SHARED_MEMORY / f"tropd.{os.getuid()}.{_namespace()}.{os.getpid()}.{start}.json"


def _namespace() -> int:
    """Number of the process namespace, because a container that shares /dev/shm may count processes of its own."""
    return (_PROCESSES / "self/ns/pid").stat().st_ino


def _write() -> None:
    """Publish this process's own ledger; without anything in it there is none."""
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
    """At the end of a process that ends by itself, what it used is gone or goes with it.

    A folder of a server that is still there stays recorded, for the next launch.
    """
    path = _ledger_path()
    left = any(folder.name.startswith(FOLDER_PREFIX) and folder.exists() for folder in map(Path, _own.folders))
    if path is not None and not left:
        path.unlink(missing_ok=True)


def _ledger_of_the_dead(path: Path) -> Ledger | None:
    """The ledger at `path` where it is of this user and all its processes are gone; None otherwise."""
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
    """Files of shared memory that carry the number of one of these processes in their name, as torch's do.

    None in a container: there a number says little.
    """
    if _namespace() != _WHOLE_MACHINE:
        return set()
    return {str(path) for pid in pids for path in SHARED_MEMORY.glob(f"torch_{pid}_*")}


def _remove_files(names: Iterable[str]) -> list[Path]:
    """Remove those of the files that are ours and that nobody uses; return them."""
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
    """Remove a temporary folder of ours; return whether it was there."""
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
    """Numbers of what any process maps of shared memory or has open, as far as this user may see."""
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
