"""Detects a hung server by probing it while our requests wait for answers. Probes do not pass through its queue.

This module does not detect servers that are gone (a request fails by itself then, see `client`) and does not restart
them (see `supervisor`). Invariant: a server that computes for long is never taken for hung, however short the limit is.
Two paths are probed:
- LIFE_PATH is answered by the HTTP process at once, also while the engine computes. Silence counts as hung after the
  limit.
- HEALTH_PATH depends on the engine: 200 while it gives results, 503 after 20 s without one. This counts as hung only
  after ENGINE_FACTOR times the limit. A long prefill on a CPU, or kernels compiled at first use, can take minutes, and
  SGLang itself ends an engine that is stuck in one batch for 300 s.

A single late probe proves nothing, because this process may have been suspended itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from tropd_mcore.progress import tick

PROBE_EVERY_S = 5.0
PROBE_TIMEOUT_S = 25.0
"""Longest wait for one probe. SGLang's HEALTH_PATH answers 503 after 20 s if the engine gives no result."""
LIFE_PATH = "/model_info"
"""Path that the HTTP process answers without the engine."""
HEALTH_PATH = "/health"
"""Path that waits for the engine."""
ENGINE_FACTOR = 5.0
"""Multiple of the limit for which HEALTH_PATH may answer 503."""
FEWEST_PROBES = 2
"""Consecutive probes that must agree."""


@dataclass(frozen=True)
class Watched:
    """The server to probe, and how long it may give no answer."""

    url: str
    limit_s: float
    generates: bool
    """Whether the requests in flight need the engine. During a weight update the engine is paused."""
    headers: dict[str, str] = field(default_factory=dict)
    stopped: Callable[[], str | None] | None = None
    """For a started server: returns which of its processes is stopped (SIGSTOP), if any"""
    busy_s: float = 0.0
    """Seconds beyond the limit for which the HTTP process may be silent while it reads a request body"""

    @property
    def every_s(self) -> float:
        return min(PROBE_EVERY_S, self.limit_s / 4)


@dataclass
class _Streak:
    """Counts consecutive probes that saw something, and when that began."""

    since: float
    count: int = 0

    def note(self, seen: bool, now: float) -> None:
        """Add the result of one probe. If it did not see it, the streak starts again."""
        self.since, self.count = (self.since, self.count + 1) if seen else (now, 0)

    def lasts(self, limit_s: float, now: float) -> bool:
        return self.count >= FEWEST_PROBES and now - self.since >= limit_s


async def hang(watched: Watched) -> str:
    """Run until the server is taken for hung, then return the reason."""
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, headers=watched.headers) as session:
        looks = [_silence(session, watched), *([_engine(session, watched)] if watched.generates else [])]
        tasks = [asyncio.ensure_future(look) for look in looks]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(task for task in tasks if task.done()).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _silence(session: aiohttp.ClientSession, watched: Watched) -> str:
    """Return the reason when the HTTP process has not answered, or a process was stopped, for the limit."""
    started = time.monotonic()
    silent, halted = _Streak(started), _Streak(started)
    while True:
        await asyncio.sleep(watched.every_s)
        status = await _status(session, f"{watched.url}{LIFE_PATH}", min(PROBE_TIMEOUT_S, watched.limit_s / 2))
        # in a thread: it reads /proc of all processes of the server
        stopped = await asyncio.to_thread(watched.stopped) if watched.stopped is not None else None
        now = time.monotonic()
        silent.note(status is None, now)
        halted.note(stopped is not None, now)
        if halted.lasts(watched.limit_s, now):
            return f"hung: {stopped}, for {now - halted.since:.0f} s"
        if silent.lasts(watched.limit_s + watched.busy_s, now):
            runs = ", although its process runs" if watched.stopped is not None else ""
            return f"hung: no answer of {LIFE_PATH} for {now - silent.since:.0f} s{runs}"


async def _engine(session: aiohttp.ClientSession, watched: Watched) -> str:
    """Return the reason when the engine has given no result for ENGINE_FACTOR times the limit."""
    unwell = _Streak(time.monotonic())
    while True:
        await asyncio.sleep(watched.every_s)
        # with a shorter time-out, a busy engine would look like one that gives no results
        status = await _status(session, f"{watched.url}{HEALTH_PATH}", PROBE_TIMEOUT_S)
        now = time.monotonic()
        unwell.note(status in (None, 503), now)
        if status == 200:
            tick()
        if unwell.lasts(ENGINE_FACTOR * watched.limit_s, now):
            found = "no answer" if status is None else "503"
            return f"hung: its engine has given nothing for {now - unwell.since:.0f} s ({HEALTH_PATH}: {found})"


async def _status(session: aiohttp.ClientSession, url: str, timeout_s: float) -> int | None:
    """The HTTP status of one probe; None if no answer came."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.get(url, timeout=timeout, allow_redirects=False) as answer:
            return answer.status
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None
