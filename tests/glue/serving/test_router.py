"""Routers that lie or lose a server: each gives one line. The lane and what it does with servers that are gone.

The routers are fakes with the API of smg's workers. Servers behind them answer as SGLang does, without a model.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from tests.glue.fake_server import VOCABULARY, FakeServer, fake_server
from tests.http_server import serving
from tropd_mcore.config.schema import RouterConfig, ServerConfig
from tropd_mcore.errors import AnswerError, ServerDied, ServerError, ServerHung
from tropd_mcore.serving import router_workers
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.router import Router, RouterSpec
from tropd_mcore.serving.router_lane import LaneServer, RouterLane
from tropd_mcore.serving.wire import Generation, GenerationRequest

KEY = "key-of-the-fleet"
PORT_OF_NOBODY = "http://127.0.0.1:9"


@dataclass
class FakeRouter:
    """Gives requests to its workers in turn. `answers`: path or `METHOD path` -> what to answer instead."""

    url: str = ""
    workers: dict[str, str] = field(default_factory=dict)
    """url -> number"""
    answers: dict[str, Callable[[], web.Response]] = field(default_factory=dict)
    change: Callable[[Any], Any] = lambda answer: answer
    """Changes what a worker answers"""
    keys: set[str | None] = field(default_factory=set)
    turn: int = 0
    coming: tuple[str, str] | None = None
    given_up: bool = False
    """Whether new workers vanish, as those that do not answer the router"""
    forgets: int = 0
    """How many looks at the list a new worker takes to appear, while the router answers 404 about it"""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.keys.add(request.headers.get("Authorization"))
        said = self.answers.get(f"{request.method} {request.path}") or self.answers.get(request.path)
        if said is not None:
            return said()
        if request.path == "/generate":
            return await self._generate(await request.json())
        if request.path == "/workers" and request.method == "POST":
            body = await request.json()
            number = f"number-{len(self.workers)}-{self.turn}"
            if body["url"] in self.workers:
                return web.json_response({"error": "exists"}, status=409)
            if self.forgets:
                self.coming = body["url"], number
            elif not self.given_up:
                self.workers[body["url"]] = number
            return web.json_response({"worker_id": number}, status=202)
        if request.path == "/workers":
            self.forgets -= bool(self.forgets)
            if self.coming is not None and not self.forgets:
                self.workers[self.coming[0]], self.coming = self.coming[1], None
            listed = [{"id": number, "url": url, "is_healthy": True} for url, number in self.workers.items()]
            return web.json_response({"workers": listed, "total": len(listed)})
        if request.method == "DELETE":
            number = request.path.rpartition("/")[2]
            self.workers = {url: each for url, each in self.workers.items() if each != number}
            return web.json_response({"status": "accepted"}, status=202)
        return web.Response(status=404)

    async def _generate(self, body: Any) -> web.Response:
        self.turn += 1
        urls = sorted(self.workers)
        if not urls:
            return web.json_response({"error": {"message": "no worker"}}, status=503)
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{urls[self.turn % len(urls)]}/generate", json=body) as answer,
            ):
                return web.json_response(self.change(await answer.json()))
        except aiohttp.ClientError:
            return web.json_response({"error": {"message": "no connection"}}, status=500)


@pytest.fixture
def fake() -> Iterator[FakeRouter]:
    made = FakeRouter()

    def app() -> web.Application:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", made.handle)
        return application

    with serving(app) as made.url:
        yield made


@pytest.fixture
def behind(fake: FakeRouter) -> Iterator[list[FakeServer]]:
    """Two servers with the same weights, which the router at the url has as workers."""
    with ExitStack() as stack:
        servers = [stack.enter_context(fake_server()) for _ in range(2)]
        for place, server in enumerate(servers):
            server.label = "v1"
            fake.workers[server.url] = f"number-{place}"
        yield servers


def server_config(**values: object) -> ServerConfig:
    return ServerConfig(**{"max_retries": 1, "hang_timeout_s": 2.0, **values})  # type: ignore[arg-type]


def router_at(url: str, folder: Path, **values: object) -> Router:
    config = RouterConfig(url=url, **{"start_timeout_s": 1.0, **values})  # type: ignore[arg-type]
    return Router(RouterSpec(config, server_config(), folder, KEY))


def member(server: FakeServer, **values: Any) -> LaneServer:
    config = server_config()
    client = SglangClient(server.url, config, key="rollout.server", name=f"server {server.url}")
    return LaneServer(client, config, KEY, **values)


def lane_of(fake: FakeRouter, behind: list[FakeServer], folder: Path, **values: Any) -> RouterLane:
    lane = RouterLane(router_at(fake.url, folder))
    for server in behind:
        lane.put_in(member(server, **values))
    return lane


def questions(count: int) -> list[GenerationRequest]:
    return [GenerationRequest(np.array([7, 8, 9 + place], np.int32), 3, VOCABULARY) for place in range(count)]


def line_of(act: Callable[[], object]) -> str:
    with pytest.raises(ServerError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_samples_come_from_all_servers_and_everything_else_is_asked_directly(
    fake: FakeRouter, behind: list[FakeServer], tmp_path: Path
) -> None:
    lane = lane_of(fake, behind, tmp_path)
    assert lane.info().weight_version == "v1"
    answers = lane.generate(questions(6))
    assert all(isinstance(answer, Generation) for answer in answers)
    assert [len(server.bodies("/generate")) for server in behind] == [3, 3]
    assert fake.keys == {f"Bearer {KEY}"}
    behind[1].label = "v0"
    assert f"{behind[0].url} 'v1', {behind[1].url} 'v0'" in line_of(lane.info)


HTML = b"<html><title>Welcome</title></html>"
LIST_LIES: dict[str, tuple[Callable[[], web.Response], str]] = {
    "html": (lambda: web.Response(body=HTML, content_type="text/html"), "answered text/html .*expected JSON"),
    "no list": (lambda: web.json_response({"workers": "two"}), "expected a list of workers"),
    "a list of words": (lambda: web.json_response({"workers": ["a"]}), "expected id and url"),
    "no number": (lambda: web.json_response({"workers": [{"url": "http://a"}]}), "expected id and url"),
    "an SGLang server": (lambda: web.Response(status=404), "has no /workers: expected SGLang's router, smg 1.13"),
    "a wrong key": (lambda: web.Response(status=401, text="no"), "401: check the key that api_key_env names"),
    "a redirect": (lambda: web.Response(status=302, headers={"Location": "/login"}), "a redirect to '?/login"),
    "a list with 202": (lambda: web.json_response({"workers": []}, status=202), "answered 202"),
}


@pytest.mark.parametrize("lie", LIST_LIES)
def test_a_router_at_a_url_that_is_none_is_one_line_at_the_start(fake: FakeRouter, tmp_path: Path, lie: str) -> None:
    answer, expected = LIST_LIES[lie]
    fake.answers["/workers"] = answer
    line = line_of(router_at(fake.url, tmp_path).wait_ready)
    assert line.startswith("rollout.router: ") and re.search(expected, line), line


def test_a_router_that_is_not_there_is_one_line(fake: FakeRouter, tmp_path: Path) -> None:
    assert "rollout.router: no connection to http://127.0.0.1:9/workers" in line_of(
        router_at(PORT_OF_NOBODY, tmp_path).wait_ready
    )


def test_a_router_that_lists_other_workers_than_the_fleet_is_refused_before_each_sampling(
    fake: FakeRouter, behind: list[FakeServer], tmp_path: Path
) -> None:
    lane = lane_of(fake, behind, tmp_path)
    fake.workers["http://127.0.0.1:9/"] = "number-9"
    assert "http://127.0.0.1:9 must not be one of them" in line_of(lambda: lane.generate(questions(1)))
    del fake.workers["http://127.0.0.1:9/"], fake.workers[behind[0].url]
    assert f"{behind[0].url} is missing" in line_of(lambda: lane.generate(questions(1)))
    assert all(server.bodies("/generate") == [] for server in behind)


def test_a_worker_that_takes_no_requests_yet_is_told_apart(
    fake: FakeRouter, behind: list[FakeServer], tmp_path: Path
) -> None:
    entries = [{"id": "a", "url": server.url, "is_healthy": True, "status": "draining"} for server in behind]
    fake.answers["/workers"] = lambda: web.json_response({"workers": entries})
    router = router_at(fake.url, tmp_path)
    assert router.workers() == ()
    assert "takes no requests" in line_of(lambda: router.check([server.url for server in behind]))


def test_an_added_server_that_the_router_gives_up_or_never_takes_in_is_one_line(
    fake: FakeRouter, behind: list[FakeServer], tmp_path: Path
) -> None:
    router = router_at(fake.url, tmp_path)
    fake.given_up = True
    assert "has given up the server at http://127.0.0.1:9: it does not answer there, or refuses the key" in line_of(
        lambda: router.add(PORT_OF_NOBODY, KEY)
    )
    fake.answers["/workers/number-2-0"] = lambda: web.json_response({"job_status": {"status": "processing"}})
    assert "has not taken in the server at http://127.0.0.1:9 after rollout.router.start_timeout_s=1 s" in line_of(
        lambda: router.add(PORT_OF_NOBODY, KEY)
    )
    fake.answers["/workers/number-2-0"] = lambda: web.json_response(
        {"job_status": {"status": "failed", "message": "no\nhealth"}}
    )
    assert "cannot use the server at http://127.0.0.1:9: no" in line_of(lambda: router.add(PORT_OF_NOBODY, KEY))
    fake.answers["POST /workers"] = lambda: web.json_response({"status": "accepted"}, status=202)
    assert "expected a worker_id" in line_of(lambda: router.add(PORT_OF_NOBODY, KEY))


@pytest.mark.parametrize("looks", [2, 3, 4])
def test_a_router_that_forgets_a_server_while_it_takes_it_in_is_asked_once_more(
    fake: FakeRouter, behind: list[FakeServer], tmp_path: Path, looks: int
) -> None:
    router = router_at(fake.url, tmp_path)
    router.remove(behind[0].url)
    fake.forgets = looks
    if looks < 4:
        router.add(behind[0].url, KEY)
        assert set(router.workers()) == {server.url for server in behind}
    else:
        assert "has given up the server" in line_of(lambda: router.add(behind[0].url, KEY))


def test_a_removal_that_never_takes_effect_is_one_line(
    fake: FakeRouter, behind: list[FakeServer], tmp_path: Path
) -> None:
    fake.answers[f"/workers/{fake.workers[behind[0].url]}"] = lambda: web.json_response({}, status=202)
    line = line_of(lambda: router_at(fake.url, tmp_path).remove(behind[0].url))
    assert f"still has the server at {behind[0].url}, which was removed" in line and "start_timeout_s=1 s" in line


def test_removing_what_is_not_there_and_adding_what_is_are_no_errors(
    fake: FakeRouter, behind: list[FakeServer], tmp_path: Path
) -> None:
    router = router_at(fake.url, tmp_path)
    router.remove(PORT_OF_NOBODY)
    before = fake.workers[behind[0].url]
    router.add(behind[0].url + "/", KEY)
    assert fake.workers[behind[0].url] != before and len(router.workers()) == 2


@pytest.mark.parametrize("dropped", ["weight_versions", "output_token_logprobs", "finish_reason"])
def test_an_answer_from_which_the_router_dropped_a_field_is_asked_for_again_and_then_left_out(
    fake: FakeRouter, behind: list[FakeServer], tmp_path: Path, dropped: str
) -> None:
    def drop(answer: Any) -> Any:
        meta = {key: value for key, value in answer["meta_info"].items() if not key.startswith(dropped[:14])}
        return {**answer, "meta_info": meta}

    fake.change = drop
    lane = lane_of(fake, behind, tmp_path)
    (answer,) = lane.generate(questions(1))
    assert isinstance(answer, AnswerError) and dropped[:14] in str(answer) and lane.asked_again == 1


def test_a_router_that_answers_samples_with_a_web_page_leaves_them_out(
    fake: FakeRouter, behind: list[FakeServer], tmp_path: Path
) -> None:
    fake.answers["/generate"] = lambda: web.Response(body=HTML, content_type="text/html")
    (answer,) = lane_of(fake, behind, tmp_path).generate(questions(1))
    assert isinstance(answer, AnswerError) and "text/html" in str(answer)


def test_a_started_server_that_ends_is_taken_out_and_the_others_answer_what_it_was_asked(
    fake: FakeRouter, behind: list[FakeServer], tmp_path: Path
) -> None:
    lane = RouterLane(router_at(fake.url, tmp_path))
    killed: list[str] = []
    lane.put_in(member(behind[0], alive=lambda: True, end=lambda: killed.append("first")))
    lane.put_in(member(behind[1], alive=lambda: not behind[1].bodies("/generate"), end=lambda: killed.append("second")))
    behind[1].die_after = 0
    answers = lane.generate(questions(8))
    assert all(isinstance(answer, Generation) for answer in answers), answers
    assert list(lane.lost) == [behind[1].url] and "its process has ended" in str(lane.lost[behind[1].url])
    assert killed == ["second"] and list(fake.workers) == [behind[0].url] and lane.servers == (behind[0].url,)
    behind[1].die_after = None
    lane.put_in(member(behind[1]))
    assert lane.lost == {} and len(fake.workers) == 2


def test_without_a_server_every_sample_has_an_error_that_says_why(
    fake: FakeRouter, behind: list[FakeServer], tmp_path: Path
) -> None:
    lane = RouterLane(router_at(fake.url, tmp_path))
    fake.workers = {behind[0].url: "number-0"}
    lane.put_in(member(behind[0], alive=lambda: False, end=lambda: None))
    behind[0].die_after = 0
    answers = lane.generate(questions(2))
    assert all(isinstance(answer, ServerDied) for answer in answers), answers
    (again,) = lane.generate(questions(1))
    assert isinstance(again, ServerDied) and "no server is behind the router" in str(again)
    assert "its process has ended" in str(again)
    with pytest.raises(ServerDied, match="no server is behind"):
        lane.info()


def test_a_server_at_a_url_that_hangs_ends_the_wait_with_its_url(
    fake: FakeRouter, behind: list[FakeServer], tmp_path: Path
) -> None:
    lane = lane_of(fake, behind, tmp_path)
    over = threading.Event()

    async def never(_: web.Request) -> web.Response:
        while not over.is_set():
            await asyncio.sleep(0.02)
        return web.Response()

    def app() -> web.Application:
        made = web.Application()
        made.router.add_route("*", "/{path:.*}", never)
        return made

    with serving(app) as silent:
        fake.workers[silent] = "number-silent"
        config = server_config(hang_timeout_s=0.4)
        lane.put_in(LaneServer(SglangClient(silent, config, key="rollout.server", name="third"), config, KEY))
        answers = lane.generate(questions(6))
        died = [answer for answer in answers if isinstance(answer, ServerDied)]
        assert len(died) == 2 and isinstance(died[0], ServerHung) and died[0].url == silent
        assert "third: hung: no answer of /model_info" in str(died[0]) and silent in lane.lost
        assert silent not in fake.workers and len(lane.servers) == 2
        over.set()


def test_a_list_with_a_worker_twice_or_with_slashes_gives_each_once() -> None:
    entries = [{"id": "a", "url": "http://a/", "is_healthy": True}, {"id": "b", "url": "http://a", "is_healthy": False}]
    (worker,) = router_workers.read_workers({"workers": entries}).values()
    assert worker.url == "http://a" and not worker.ready
