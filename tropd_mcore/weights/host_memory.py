"""Host memory: how much a process may still take, returning freed memory to the system, and sizes in messages.

This module does not handle GPU memory. Invariant: a limit of the container or of the batch system counts like the size
of the machine, because a process that exceeds it is killed without a message.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

GIB = 2**30
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROC_CGROUP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Return the bytes that this process can take before the machine, or its control group, has none left."""
    import psutil

    free = int(psutil.virtual_memory().available)
    room = cgroup_room()
    return free if room is None else min(free, room)


def cgroup_room(root: Path = _CGROUP_ROOT, membership: Path = _PROC_CGROUP) -> int | None:
    """Return the bytes left below the tightest memory limit of this process's control groups; None without a limit.

    Supports version 2, and version 1 with its memory controller at <root>/memory. Pages of the file cache that can be
    dropped count as free.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None  # no control groups on this system
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            rooms += _rooms(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            rooms += _rooms(root / "memory", path, *names)
    return min(rooms, default=None)


def release_freed_memory() -> None:
    """Return freed memory to the system, including memory between blocks that are in use.

    By default glibc returns only the end of its heap. Large buffers that are freed between small blocks in use then
    leave holes. This function calls malloc_trim(0); with another C library it does nothing. Cost: milliseconds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def gib(size: float) -> str:
    """Return `size` bytes as text in GiB."""
    return f"{size / GIB:.1f} GiB" if size >= 0.05 * GIB else f"{size / GIB:.2g} GiB"


def _rooms(root: Path, path: str, limit_file: str, used_file: str, cache_key: str) -> list[int]:
    """Return the free bytes of each control group with a limit, from the process's own group up to the root."""
    rooms = []
    group = root / path.lstrip("/")
    for folder in [group, *group.parents]:
        if folder != root and root not in folder.parents:
            break
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        if limit is not None and used is not None:
            rooms.append(max(0, limit - used + _cache(folder / "memory.stat", cache_key)))
    return rooms


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is no file or no limit ("max")."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cache(path: Path, key: str) -> int:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [key]), 0)
