"""Whether a server that owes us answers is hung: asked beside the requests, from outside of its queue.

Not for servers that are gone (a request meets that by itself, see `client`) and not for restarting (see `supervisor`).
Invariants: a server that works for long is never taken for hung, however short the limit is. Its HTTP process answers
LIFE_PATH at once while the engine computes, so silence there counts after the limit. HEALTH_PATH tells of the engine:
200 as long as results come, else 503 after 20 s. That counts after ENGINE_FACTOR times the limit: a long prefill on a
CPU, or kernels that are compiled at their first use, take minutes, and SGLang ends an engine that is stuck in one batch
for 300 s by itself. One late probe proves nothing: this process may have been stopped itself.
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
"""Longest wait for one probe; SGLang's HEALTH_PATH answers 503 after 20 s where the engine gives nothing."""
LIFE_PATH = "/model_info"
"""What the HTTP process answers by itself."""
HEALTH_PATH = "/health"
"""What waits for the engine."""
ENGINE_FACTOR = 5.0
"""How many times as long as the limit an HTTP process may say 503 for its engine."""
FEWEST_PROBES = 2
"""Probes in a row that must say the same."""


@dataclass(frozen=True)
class Watched:
    """What is asked, and for how long nothing may come of it."""

    url: str
    limit_s: float
    generates: bool
    """Whether the requests in flight are for the engine; while weights are updated it is paused by us."""
    headers: dict[str, str] = field(default_factory=dict)
    stopped: Callable[[], str | None] | None = None
    """Of a started server: which of its processes is stopped (SIGSTOP), if one is"""
    busy_s: float = 0.0
    """Seconds for which the HTTP process may be silent beyond the limit, because it reads what was sent"""

    @property
    def every_s(self) -> float:
        return min(PROBE_EVERY_S, self.limit_s / 4)


@dataclass
class _Streak:
    """Since when, and how many times in a row, something was seen."""

    since: float
    count: int = 0

    def note(self, seen: bool, now: float) -> None:
        """Add what a probe saw; the streak begins again where it did not see it."""
        self.since, self.count = (self.since, self.count + 1) if seen else (now, 0)

    def lasts(self, limit_s: float, now: float) -> bool:
        return self.count >= FEWEST_PROBES and now - self.since >= limit_s


async def hang(watched: Watched) -> str:
    """Return why the server is taken for hung, once it is; runs until then."""
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
    """Why, once the HTTP process has answered nothing, or a process was stopped, for the limit."""
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
    """Why, once the engine has given nothing for ENGINE_FACTOR times the limit."""
    unwell = _Streak(time.monotonic())
    while True:
        await asyncio.sleep(watched.every_s)
        # never a shorter wait: a busy engine would look like one that gives nothing
        status = await _status(session, f"{watched.url}{HEALTH_PATH}", PROBE_TIMEOUT_S)
        now = time.monotonic()
        unwell.note(status in (None, 503), now)
        if status == 200:
            tick()
        if unwell.lasts(ENGINE_FACTOR * watched.limit_s, now):
            found = "no answer" if status is None else "503"
            return f"hung: its engine has given nothing for {now - unwell.since:.0f} s ({HEALTH_PATH}: {found})"


async def _status(session: aiohttp.ClientSession, url: str, timeout_s: float) -> int | None:
    """The HTTP status of one probe; None where no answer came."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.get(url, timeout=timeout, allow_redirects=False) as answer:
            return answer.status
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None
