"""Finds ranks of this machine that were stopped (by SIGSTOP or a debugger). The launcher uses it.

Ranks of other machines, and ranks that hang while they run, are found by the ranks themselves (`watch`), but only after
a rank has sent its first beat. Invariant: time counts only while the launcher itself runs. A machine that slept, or
Ctrl-Z on the whole job, therefore causes no error.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping

import psutil

LOOK_S = 1.0
"""Time between two checks."""
SAY_AFTER_S = 20.0
"""A rank that has been stopped for this time is reported."""
GRACE_S = 5.0
"""Added to the limit of the ranks' own watch, so the ranks report first: they know what the stopped rank was doing."""


class StoppedRanks:
    """Measures how long each rank has been stopped. `say` prints the line about a rank that may still continue."""

    def __init__(self, limit_s: float, say: Callable[[str], None]) -> None:
        self._limit_s = limit_s + GRACE_S
        self._say = say
        self._stopped_s: dict[int, float] = {}
        self._told: set[int] = set()
        self._last = time.monotonic()

    def look(self, pids: Mapping[int, int]) -> tuple[int, str] | None:
        """Check the ranks {rank: pid}; returns a rank that was stopped for too long, and the reason to end the job."""
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
