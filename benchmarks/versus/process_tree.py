"""Runs a command and measures all its processes together: CPU-seconds, resident memory, and when each step ended.

Servers that a job starts in sessions of their own are counted too: as long as this process is the subreaper, they stay
its descendants even after their parent has ended. Only one command runs at a time.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_S = 0.2
PSS_EVERY_S = 2.0
"""Reading proportional memory costs the kernel a walk over all pages, so it is read less often."""
LEFT_BEHIND_S = 20.0
PR_SET_CHILD_SUBREAPER = 36
TICKS, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Sample:
    """All processes at one time."""

    wall_s: float
    """since the launch"""
    cpu_s: float
    """since the launch, user and system, of living and ended processes"""
    rss_bytes: int = 0
    """sum of the resident sets; a shared page counts once per process"""
    pss_bytes: int = 0
    """sum of the proportional sets; a shared page counts once. 0 = not read at this time"""


@dataclass
class Measured:
    """What a command cost."""

    exit_code: int | None = None
    """None if it was stopped at its time limit"""
    marks: list[Sample] = field(default_factory=list)
    """when each line of the watched file was first seen"""
    timeline: list[Sample] = field(default_factory=list)

    def cpu_at(self, wall_s: float) -> float:
        """Return the CPU-seconds until `wall_s`, between two samples on a straight line."""
        before = Sample(0.0, 0.0)
        for after in self.timeline:
            if after.wall_s >= wall_s:
                share = (wall_s - before.wall_s) / max(after.wall_s - before.wall_s, 1e-9)
                return before.cpu_s + share * (after.cpu_s - before.cpu_s)
            before = after
        return before.cpu_s


def measure(
    command: Sequence[str], *, watched: Path, log: Path, environment: Mapping[str, str], cwd: Path, limit_s: float
) -> Measured:
    """Run `command` to its end and measure it. Output goes to `log`; a line of `watched` is the end of a step."""
    measured, ended_before, others = Measured(), _reaped_s(), frozenset(_descendants())
    _be_subreaper(True)
    begun = pss_read = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(environment), cwd=cwd)
        try:
            while True:
                ended = process.poll() is not None
                now = time.monotonic()
                if now - begun > limit_s:
                    break
                living = _descendants(but=others)
                due = now - pss_read >= PSS_EVERY_S
                sample = Sample(
                    wall_s=now - begun,
                    cpu_s=_reaped_s() - ended_before + sum(each.cpu_s for each in living.values()),
                    rss_bytes=sum(each.rss_bytes for each in living.values()),
                    pss_bytes=sum(map(_pss_bytes, living)) if due else 0,
                )
                pss_read = now if due else pss_read
                measured.timeline.append(sample)
                measured.marks += [sample] * (_count_lines(watched) - len(measured.marks))
                if ended:
                    measured.exit_code = process.returncode
                    break
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(LEFT_BEHIND_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            _reap(others)
            _be_subreaper(False)
    return measured


@dataclass(frozen=True)
class _Process:
    parent: int
    cpu_s: float
    """own and of its reaped children"""
    rss_bytes: int


def _descendants(but: frozenset[int] = frozenset()) -> dict[int, _Process]:
    """{pid: process} of all processes below this one, except those in `but` and what is below them."""
    everybody: dict[int, _Process] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) not in but:
            try:
                text = Path(entry.path, "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended since the listing
            everybody[int(entry.name)] = parse_stat(text)
    found: dict[int, _Process] = {}
    parents = {os.getpid()}
    while parents:
        new = {pid: each for pid, each in everybody.items() if each.parent in parents}
        found |= new
        parents = set(new)
    return found


def parse_stat(text: str) -> _Process:
    """Return the parent, CPU-seconds and resident bytes in a /proc/<pid>/stat. Its second field may hold anything."""
    fields = text.rpartition(")")[2].split()
    return _Process(parent=int(fields[1]), cpu_s=sum(map(int, fields[11:15])) / TICKS, rss_bytes=int(fields[21]) * PAGE)


def _reaped_s() -> float:
    """CPU-seconds of this process's children that have ended and were waited for."""
    times = os.times()
    return times.children_user + times.children_system


def _pss_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _be_subreaper(on: bool) -> None:
    """Take over (or no longer) the descendants whose parent ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def _reap(others: frozenset[int]) -> None:
    """Wait for what outlived the command and was handed to this process."""
    until = time.monotonic() + LEFT_BEHIND_S
    while time.monotonic() < until:
        mine = [pid for pid, each in _descendants(but=others).items() if each.parent == os.getpid()]
        if not mine:
            return
        for pid in mine:
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.1)
