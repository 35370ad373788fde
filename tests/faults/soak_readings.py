"""Current resource use of one job's processes and folders: memory, handles, threads, shared memory, disk.

This module does not evaluate the numbers (`soak_slopes` does). Invariant: every process is a descendant of the launcher
that we started, found by pid and start time. No process is looked up by name.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
LARGE_FILE = 1 << 14
"""Bytes from which a file next to the sub-folders gets its own line."""
PROCESS_QUANTITIES = ("anonymous", "rss", "handles", "threads", "written")
"""Bytes of anonymous memory, bytes with shared pages and mapped files, open handles, threads, and bytes that it had
written to disk. A leak shows in the first. Unique pages (USS) would count mapped libraries as soon as no other process
of the machine has them mapped."""


@dataclass
class Series:
    """One process over time. `values` has a row of `PROCESS_QUANTITIES` for each entry of `steps`."""

    role: str
    """Its role in the job: `rank 0`, `rollout server > sglang::scheduler`."""
    pid: int
    steps: list[int] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)


@dataclass
class FolderSeries:
    """Bytes of one part of a folder over time. A row is (bytes, bytes on disk with partly used blocks, files)."""

    steps: list[int] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)


class ProcessTree:
    """All processes that descend from `launcher`, each with the role that it has in the job."""

    def __init__(self, launcher: int) -> None:
        self.series: dict[tuple[int, float], Series] = {}
        self._launcher = psutil.Process(launcher)
        self._roles: dict[tuple[int, float], str] = {}

    def read(self, step: int) -> None:
        """Add a reading of each living process."""
        for process in self.members():
            with contextlib.suppress(psutil.Error, OSError):
                key = (process.pid, process.create_time())
                values = _readings(process)
                series = self.series.setdefault(key, Series(self._role(process, key), process.pid))
                series.steps.append(step)
                series.values.append(values)

    def members(self) -> list[psutil.Process]:
        """The launcher and its descendants, parents first."""
        try:
            return [self._launcher, *self._launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def survivors(self) -> list[Series]:
        """Processes that were read before and still run."""
        return [series for key, series in self.series.items() if _lives(*key)]

    def pids(self) -> set[int]:
        """PIDs of all processes that were read so far."""
        return {pid for pid, _ in self.series}

    def _role(self, process: psutil.Process, key: tuple[int, float]) -> str:
        if key not in self._roles:
            self._roles[key] = self._new_role(process)
        return self._roles[key]

    def _new_role(self, process: psutil.Process) -> str:
        if process.pid == self._launcher.pid:
            return "launcher"
        parent = process.parent()
        above = self._role(parent, (parent.pid, parent.create_time())) if parent is not None else "?"
        command = process.cmdline()
        own = _short_name(process, command)
        if above.startswith("launcher"):
            rank = process.environ().get("RANK")
            return f"rank {rank}" if rank is not None and "tropd_mcore.train" in command else f"{above} > {own}"
        if any(word.endswith("/serving/sglang_launch.py") for word in command):
            return "teacher server" if _is_teacher(command) else "rollout server"
        return f"{above} > {own}"


def _is_teacher(command: list[str]) -> bool:
    return any(Path(word).name == "teacher" for word in command)


def _short_name(process: psutil.Process, command: list[str]) -> str:
    """The name that a process gives itself, else the module or the script that it runs."""
    if command and command[0].startswith("sglang::"):
        return command[0].split()[0]
    for flag, word in pairwise(command):
        if flag == "-m":
            return word
        if flag == "-c":
            return word.split("import ")[-1].split("(")[0].split(";")[0].strip()[:40]
    return process.name()


def _readings(process: psutil.Process) -> list[float]:
    with process.oneshot():
        return [
            float(_anonymous(process.pid)),
            float(process.memory_info().rss),
            float(process.num_fds()),
            float(process.num_threads()),
            float(process.io_counters().write_bytes),
        ]


def _anonymous(pid: int) -> int:
    """RssAnon of a process, in bytes. Raises OSError if it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise ProcessLookupError(pid)  # a process that has ended has no memory


def _lives(pid: int, start_time: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == start_time and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class SharedMemory:
    """Names in /dev/shm that appeared after the start and belong to the job. Names of other jobs are not counted."""

    def __init__(self) -> None:
        self._before = self._names()
        self._ours: set[str] = set()
        self.series = FolderSeries()

    def read(self, step: int, tree: ProcessTree) -> None:
        """Add a reading: bytes and names that the job holds, and names that it ever created."""
        new = self._names() - self._before
        if unknown := new - self._ours:
            known = {str(pid) for pid in tree.pids()}
            mapped = set().union(*(_mapped(process) for process in tree.members()))
            self._ours |= {name for name in unknown if name in mapped or known & set(name.split("_"))}
        sizes = [_size(SHARED_MEMORY / name) for name in new & self._ours]
        self.series.steps.append(step)
        self.series.values.append([float(sum(sizes)), float(len(sizes)), float(len(self._ours))])

    def left(self) -> list[str]:
        """Names of the job that still exist."""
        return sorted(self._names() & self._ours)

    @staticmethod
    def _names() -> set[str]:
        return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else set()


def _mapped(process: psutil.Process) -> set[str]:
    """Names in /dev/shm that a process has mapped or open."""
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/maps").read_text(errors="replace").splitlines():
            if f" {SHARED_MEMORY}/" in line:
                found.add(Path(line.split(maxsplit=5)[-1].removesuffix(" (deleted)")).name)
    with contextlib.suppress(psutil.Error, OSError):
        found |= {
            Path(handle.path).name for handle in process.open_files() if Path(handle.path).parent == SHARED_MEMORY
        }
    return found


class Folder:
    """A folder and its sub-folders, each measured with all of its content."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.parts: dict[str, FolderSeries] = {}

    def read(self, step: int) -> None:
        """Add a reading of the whole and of each sub-folder. A new sub-folder has no earlier readings."""
        if self.root.is_dir():
            self._add("all", step, self.root)
            for entry in sorted(self.root.iterdir()):
                if entry.is_dir() or entry.stat().st_size >= LARGE_FILE:
                    self._add(entry.name + "/" * entry.is_dir(), step, entry)

    def _add(self, name: str, step: int, place: Path) -> None:
        series = self.parts.setdefault(name, FolderSeries())
        series.steps.append(step)
        series.values.append(_weigh(place))


def _weigh(path: Path) -> list[float]:
    """(bytes, bytes of the blocks that they take, files) of a file or a folder."""
    total = [0.0, 0.0, 0.0]
    for file in _files(path):
        with contextlib.suppress(OSError):  # removed meanwhile
            found = file.stat(follow_symlinks=False)
            total = [total[0] + found.st_size, total[1] + found.st_blocks * 512, total[2] + 1]
    return total


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [Path(folder) / name for folder, _, names in os.walk(path) for name in names]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
