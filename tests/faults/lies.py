"""A job of one rank whose servers are behind a lying proxy (`tests/liars.py`), and further lies.

`rows_servers` and `rows_teachers` say what is right. Invariant: the servers behind the proxies are real, and shared by
all faults. Only the proxy lies.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.faults.scene import Scene
from tests.faults.verdict import Seen
from tests.liars import Body, Forward, Liar, Lie, liar

Prepare = Callable[[Liar], None]
ESCAPE = "\x1b]0;owned\x07\x1b[2J\r\nerror: a second line that nobody wrote\x1b[31m"
"""Control sequences that take over a terminal that prints them unchanged."""
HTML = "<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in</body></html>"


def one_rank(scene: Scene, steps: int, *more: str) -> None:
    """Make the scene's command a short job of one rank that uses the shared rollout server."""
    scene.config = scene.stage.live_config
    scene.overrides = [
        "parallel.tensor=1",
        f"run.steps={steps}",
        "run.export_at_end=false",
        "run.checkpoint_every=100",
        "rollout.server.max_total_tokens=null",
        f"rollout.server.url={scene.stage.outside('student').url}",
        *more,
    ]


def lying_sampler(scene: Scene, prepare: Prepare, *, steps: int = 2, more: tuple[str, ...] = ()) -> Liar:
    """The same, with a lying proxy in front of the rollout server."""
    one_rank(scene, steps)
    proxy = _proxy(scene, scene.stage.outside("student").url)
    scene.overrides += [f"rollout.server.url={proxy.url}", *more]
    prepare(proxy)
    return proxy


def lying_teacher(scene: Scene, prepare: Prepare, *, steps: int = 2, more: tuple[str, ...] = ()) -> Liar:
    """A job whose teacher server is behind a lying proxy."""
    one_rank(scene, steps)
    proxy = _proxy(scene, scene.stage.outside("teacher").url)
    scene.overrides += ["teacher.kind=sglang", f"teacher.server.url={proxy.url}", "objective.guidance.enabled=false"]
    scene.overrides += more
    prepare(proxy)
    return proxy


def whole_run(scene: Scene) -> Seen:
    """The job from start to end. The fault is present from the beginning."""
    launch = scene.job()
    scene.struck = 0.0
    return scene.end(launch)


def raw_controls(output: str) -> list[str]:
    """Control characters that would reach a terminal."""
    found = sorted(set(re.findall(r"[\x00-\x08\x0b-\x1f\x7f]", output)) - {"\r"})
    return [f"control characters in the output: {found}"] if found else []


def status(code: int, text: str = "try again later", content_type: str = "text/plain") -> Lie:
    """An answer with a status."""

    async def lie(_body: Body, _forward: Forward) -> Any:
        return web.Response(status=code, text=text, content_type=content_type)

    return lie


async def html(_body: Body, _forward: Forward) -> Any:
    """A login page, with status 200."""
    return web.Response(text=HTML, content_type="text/html")


async def not_json(_body: Body, _forward: Forward) -> Any:
    """Something that begins like JSON."""
    return web.Response(text='{"text": "half an ans', content_type="application/json")


class Reset(web.Response):
    """An answer whose connection breaks before it or in its middle."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__(body=b"x" * 100, content_type="application/json")
        self._whole = whole

    async def prepare(self, request: web.BaseRequest) -> Any:
        """Break the connection instead of the answer, or after its head."""
        transport = request.transport
        assert transport is not None
        if not self._whole:
            transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
        transport.abort() if self._whole else transport.close()
        raise ConnectionResetError


async def reset(_body: Body, _forward: Forward) -> Any:
    """No answer. The connection breaks before the work is done."""
    return Reset(whole=True)


async def reset_after(body: Body, forward: Forward) -> Any:
    """No answer. The connection breaks after the work is done."""
    await forward(body)
    return Reset(whole=True)


async def truncated(body: Body, forward: Forward) -> Any:
    """The connection breaks in the middle of the answer."""
    await forward(body)
    return Reset(whole=False)


async def abort(body: Body, forward: Forward) -> Any:
    """The server aborted the request."""
    answer = await forward(body)
    answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "aborted"}
    return answer


async def slow(body: Body, forward: Forward) -> Any:
    """An answer that takes 3 seconds longer."""
    await asyncio.sleep(3)
    return await forward(body)


class Hang:
    """No answer until the proxy has to end, because it would wait for its answers."""

    def __init__(self) -> None:
        self.over = threading.Event()

    async def __call__(self, _body: Body, _forward: Forward) -> Any:
        """Wait."""
        while not self.over.is_set():
            await asyncio.sleep(0.1)
        return web.Response(status=500)


hang = Hang()
"""State of the running proxy. The faults of the shared servers are played one after the other."""


def _proxy(scene: Scene, upstream: str) -> Liar:
    proxy = scene.cleanup.enter_context(liar(upstream))
    hang.over.clear()
    scene.cleanup.callback(hang.over.set)
    return proxy


ONCE: dict[str, Lie] = {
    "500": status(500),
    "503": status(503),
    "429": status(429),
    "reset before the work": reset,
    "reset after the work": reset_after,
    "truncated body": truncated,
    "not JSON": not_json,
    "a web page": html,
    "abort": abort,
    "slow": slow,
}
"""Transient failures. Each happens once, and the request is repeated."""


@dataclass
class Told:
    """The lies of a proxy, and the requests that they are about."""

    times: Counter[str] = field(default_factory=Counter)
    """Name of the lie -> requests that it is about."""
    victims: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name of the lie -> token ids of the request."""


def each_once(proxy: Liar, lies: dict[str, Lie], about: Callable[[Body], bool]) -> Told:
    """Tell every lie about one request."""
    left, told = list(lies.items()), Told()

    async def lie(body: Body, forward: Forward) -> Any:
        if not left or not about(body):
            return await forward(body)
        name, answer = left.pop(0)
        told.times[name] += 1
        return await answer(body, forward)

    proxy.lies["/generate"] = lie
    return told


def each_always(proxy: Liar, lies: dict[str, Lie], about: Callable[[Body], bool], *, of: int, victims: int) -> Told:
    """Tell each lie about one sequence of token ids in every request for it; `victims` of each `of` sequences."""
    left, told = list(lies), Told()
    chosen: dict[tuple[int, ...], str] = {}
    seen: set[tuple[int, ...]] = set()

    async def lie(body: Body, forward: Forward) -> Any:
        if not about(body):
            return await forward(body)
        ids = tuple(body["input_ids"])
        if ids not in seen and left and len(seen) % of < victims:
            chosen[ids] = left.pop(0)
            told.victims[chosen[ids]] = ids
        seen.add(ids)
        if ids not in chosen:
            return await forward(body)
        told.times[chosen[ids]] += 1
        return await lies[chosen[ids]](body, forward)

    proxy.lies["/generate"] = lie
    return told
