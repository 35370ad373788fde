"""A small HTTP server in a thread of the test's process, on loopback and a port that the OS chooses."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

LAST_ANSWERS_S = 2.0
"""Longest time at the end for answers that nobody waits for any more, in seconds."""
START_LIMIT_S = 60.0
"""Longest time for the start, in seconds. It only ends a hang."""


@contextmanager
def serving(make: Callable[[], web.Application]) -> Iterator[str]:
    """Serve what `make` returns, called in the server's thread. Yields the URL without a final slash."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    async def start() -> web.AppRunner:
        runner = web.AppRunner(make(), shutdown_timeout=LAST_ANSWERS_S)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        return runner

    def work() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(START_LIMIT_S)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
