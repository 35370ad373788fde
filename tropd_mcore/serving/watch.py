"""Whether a server that owes us answers is hung: asked beside the requests, from outside of its queue.

Not for servers that are gone (a request meets that by itself, see `client`) and not for restarting (see `supervisor`).
Invariants: a server that works for long is never taken for hung. Its HTTP process answers GET /health while the engine
computes (200 as long as results come, else 503 after 20 s), so only silence counts at once. A 503 counts after
ENGINE_FACTOR times the limit: a long prefill on a CPU, or kernels that are compiled at their first use, take minutes,
and SGLang ends an engine that is stuck in one batch for 300 s by itself. One late probe proves nothing: this process
may have been stopped itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

PROBE_EVERY_S = 5.0
PROBE_TIMEOUT_S = 25.0
"""Longest wait for one probe; SGLang's /health answers 503 after 20 s where the engine gives nothing."""
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
    """Whether the requests in flight are for the engine. While weights are updated the engine is paused by us, and
    /health would wait for it; then an answer of any kind shows that the HTTP process lives."""
    headers: dict[str, str] = field(default_factory=dict)
    stopped: Callable[[], str | None] | None = None
    """Of a started server: which of its processes is stopped (SIGSTOP), if one is"""

    @property
    def path(self) -> str:
        return "/health" if self.generates else "/model_info"


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
    started = time.monotonic()
    silent, unwell, halted = _Streak(started), _Streak(started), _Streak(started)
    limit = watched.limit_s
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, headers=watched.headers) as session:
        while True:
            await asyncio.sleep(min(PROBE_EVERY_S, limit / 4))
            status = await _status(session, watched)
            # in a thread: it reads /proc of all processes of the server
            stopped = await asyncio.to_thread(watched.stopped) if watched.stopped is not None else None
            now = time.monotonic()
            silent.note(status is None, now)
            unwell.note(watched.generates and status in (None, 503), now)
            halted.note(stopped is not None, now)
            if halted.lasts(limit, now):
                return f"hung: {stopped}, for {now - halted.since:.0f} s"
            if silent.lasts(limit, now):
                runs = ", although its process runs" if watched.stopped is not None else ""
                return f"hung: no answer of {watched.path} for {now - silent.since:.0f} s{runs}"
            if unwell.lasts(ENGINE_FACTOR * limit, now):
                return f"hung: its engine has given nothing for {now - unwell.since:.0f} s (/health answers 503)"


async def _status(session: aiohttp.ClientSession, watched: Watched) -> int | None:
    """The HTTP status of one probe; None where no answer came."""
    timeout = aiohttp.ClientTimeout(total=min(PROBE_TIMEOUT_S, watched.limit_s / 2))
    try:
        async with session.get(f"{watched.url}{watched.path}", timeout=timeout, allow_redirects=False) as answer:
            return answer.status
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None
