"""Ranks of this machine that were stopped (SIGSTOP, a debugger), as the launcher sees them from outside.

Not for ranks of other machines or for ranks that hang while they run: these the ranks see of each other (`watch`), but
only once each has begun to beat. Invariant: time counts only while the launcher runs itself, so that a machine that
slept, or Ctrl-Z over the whole job, accuses nobody.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping

import psutil

LOOK_S = 1.0
"""Between two looks."""
SAY_AFTER_S = 20.0
"""A rank that is stopped for so long is told of."""
GRACE_S = 5.0
"""More than the ranks have for each other, so that those that watch it speak first: they know what it was at."""


class StoppedRanks:
    """For how long each rank has been stopped. `say` gets the line about one that may still go on."""

    def __init__(self, limit_s: float, say: Callable[[str], None]) -> None:
        self._limit_s = limit_s + GRACE_S
        self._say = say
        self._stopped_s: dict[int, float] = {}
        self._told: set[int] = set()
        self._last = time.monotonic()

    def look(self, pids: Mapping[int, int]) -> tuple[int, str] | None:
        """Look at the ranks {rank: pid}; returns one that was stopped for too long, and why the job has to end."""
        now = time.monotonic()
        if now - self._last < LOOK_S:
            return None
        seconds, self._last = min(now - self._last, 2 * LOOK_S), now
        for rank, pid in pids.items():
            if not _is_stopped(pid):
                self._stopped_s.pop(rank, None)
                self._told.discard(rank)
                continue
            stopped_s = self._stopped_s[rank] = self._stopped_s.get(rank, 0.0) + seconds
            if stopped_s > self._limit_s:
                return rank, f"has been stopped (SIGSTOP) for {stopped_s:.0f} s (run.rank_timeout_s)"
            if stopped_s > min(SAY_AFTER_S, self._limit_s / 2) and rank not in self._told:
                self._told.add(rank)
                left_s = self._limit_s - stopped_s
                self._say(
                    f"rank {rank} (pid {pid}) is stopped (SIGSTOP); the job ends in {left_s:.0f} s if it stays so"
                )
        return None


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
    return False
