"""How requests are given to several servers: in which order, to whom, and what happens to those of slow and lost ones.

The servers are small HTTP servers that sample one token per tick and end requests when they are told to abort them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from tests.http_server import serving
from tropd_mcore.config.schema import RolloutConfig, ServerConfig
from tropd_mcore.errors import ServerDied, ServerError, ServerHung
from tropd_mcore.rollout.sampler import SglangSampler
from tropd_mcore.serving import dispatch as dispatch_module
from tropd_mcore.serving.client import SglangClient, generate_on, score_on
from tropd_mcore.serving.wire import Generation, GenerationRequest, ScoringRequest
from tropd_mcore.serving.work import Dispatched, Speeds
from tropd_mcore.types import SampleRequest

LOGP = -0.5
VERSION = "v1"


@dataclass(eq=False)
class Sampling:
    """A server that samples token 7, one per `tick_s`, for every request at the same time."""

    tick_s: float = 0.005
    version: str = VERSION
    status: int = 200
    hears_aborts: bool = True
    dies_after: int | None = None
    """Number of answers after which it closes connections without an answer"""
    asked: list[dict[str, Any]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    answered: int = 0
    most: int = 0
    """Largest number of requests at the same time"""
    running: dict[str, asyncio.Event] = field(default_factory=dict)
    url: str = ""
    released: bool = False

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/abort_request":
            rid = (await request.json())["rid"]
            self.aborted.append(rid)
            if self.hears_aborts and rid in self.running:
                self.running[rid].set()
            return web.Response()
        if request.path != "/generate":
            return web.json_response({})
        return await self._generate(request)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        if self.dies_after is not None and self.answered >= self.dies_after:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if self.status != 200:
            return web.json_response({"error": "no"}, status=self.status)
        rid, want = body["rid"], body["sampling_params"]["max_new_tokens"]
        stop = self.running[rid] = asyncio.Event()
        self.most = max(self.most, len(self.running))
        done = 0
        while done < want and not stop.is_set() and not self.released:
            await asyncio.sleep(self.tick_s)
            done += 1
        del self.running[rid]
        self.answered += 1
        reason = {"type": "abort", "message": "Aborted"} if done < want else {"type": "length", "length": want}
        meta = {
            "finish_reason": reason,
            "prompt_tokens": len(body["input_ids"]),
            "weight_version": self.version,
            "output_token_logprobs": [[LOGP, 7, None]] * done,
        }
        if want == 0:
            ids = body["input_ids"]
            start = body["logprob_start_len"]
            meta["input_token_logprobs"] = [[None, ids[start], None], *([[LOGP, i, None] for i in ids[start + 1 :]])]
            await asyncio.sleep(self.tick_s * len(ids))
        return web.json_response({"output_ids": [7] * done, "meta_info": meta})

    def app(self) -> web.Application:
        made = web.Application()
        made.router.add_route("*", "/{path:.*}", self.answer)
        return made

    def lengths(self) -> list[int]:
        return [body["sampling_params"]["max_new_tokens"] for body in self.asked]


Serve = Callable[..., Sampling]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(**given: Any) -> Sampling:
            server = Sampling(**given)
            server.url = stack.enter_context(serving(server.app))
            stack.callback(setattr, server, "released", True)
            return server

        yield start


@pytest.fixture(autouse=True)
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch_module, "LOOK_S", 0.02)
    monkeypatch.setattr(dispatch_module, "PATIENCE_S", 0.1)


def clients_of(*servers: Sampling, at_once: int = 64) -> list[SglangClient]:
    return [
        SglangClient(
            server.url,
            ServerConfig(url=server.url, max_retries=1, max_concurrency=at_once),
            key=f"rollout.servers.{place}",
        )
        for place, server in enumerate(servers)
    ]


def request(first: int, new: int) -> GenerationRequest:
    return GenerationRequest(np.array([first, 3], np.int32), max_new_tokens=new, vocab_size=50)


def whole(found: Dispatched[Generation], asked: list[GenerationRequest]) -> None:
    """Every answer has its full length, with one log-prob per token, in the order of the questions."""
    for answer, question in zip(found.answers, asked, strict=True):
        assert isinstance(answer, Generation), answer
        assert answer.output_ids.tolist() == [7] * question.max_new_tokens and answer.finish_reason == "length"
        assert answer.logp.tolist() == [LOGP] * question.max_new_tokens and answer.weight_versions == (VERSION,)


def test_the_longest_are_asked_first_and_the_answers_keep_the_order_of_the_questions(serve: Serve) -> None:
    server = serve()
    asked = [request(first, new) for first, new in ((1, 2), (2, 9), (3, 5), (4, 9))]
    whole(generate_on(clients_of(server, at_once=1), asked), asked)
    assert server.lengths() == [9, 9, 5, 2]


def test_samples_of_a_prompt_stay_together_if_nobody_is_idle_for_that(serve: Serve) -> None:
    servers = [serve(), serve()]
    asked = [request(group, 3 + sample % 2) for sample in range(4) for group in range(8)]
    whole(generate_on(clients_of(*servers), asked), asked)
    groups = [{body["input_ids"][0] for body in server.asked} for server in servers]
    assert len(groups[0] & groups[1]) <= 2 and all(12 <= len(server.asked) <= 20 for server in servers)


def test_no_server_has_more_requests_than_it_takes_and_a_fast_one_gets_more(serve: Serve) -> None:
    servers = [serve(tick_s=0.002), serve(tick_s=0.008)]
    asked = [request(index, 10) for index in range(40)]
    found = generate_on(clients_of(*servers, at_once=3), asked)
    whole(found, asked)
    assert [server.most for server in servers] == [3, 3]
    assert len(servers[0].asked) > len(servers[1].asked) > 0
    assert found.speeds[0] > found.speeds[1]


def test_shares_follow_the_speeds(serve: Serve) -> None:
    servers = [serve(), serve()]
    asked = [request(index, 4) for index in range(30)]
    generate_on(clients_of(*servers), asked, speeds=[1.0, 0.25])
    assert len(servers[0].asked) >= 3 * len(servers[1].asked) > 0


def test_the_questions_of_a_server_that_dies_go_to_the_others(serve: Serve) -> None:
    dying, other = serve(dies_after=2), serve()
    asked = [request(index, 3 + index) for index in range(10)]
    found = generate_on(clients_of(dying, other, at_once=2), asked)
    whole(found, asked)
    assert isinstance(found.lost[0], ServerDied) and not found.may_return and found.again > 0
    assert len(other.asked) > 5


def test_if_all_servers_die_what_arrived_is_kept(serve: Serve) -> None:
    servers = [serve(dies_after=1), serve(dies_after=2)]
    asked = [request(index, 3) for index in range(10)]
    found = generate_on(clients_of(*servers, at_once=1), asked)
    answered = [answer for answer in found.answers if isinstance(answer, Generation)]
    assert len(answered) == 3 and found.lost.keys() == {0, 1}
    assert all(isinstance(answer, ServerDied) for answer in found.answers if not isinstance(answer, Generation))


def test_samples_of_a_slow_server_go_on_elsewhere_from_their_tokens(serve: Serve) -> None:
    fast, slow = serve(tick_s=0.002), serve(tick_s=0.2)
    asked = [request(index, 60 + index) for index in range(8)]
    found = generate_on(clients_of(fast, slow), asked)
    whole(found, asked)
    assert found.moved >= 4 and found.again == 0 and not found.lost and found.slow == {1}
    assert len(slow.aborted) == len(set(slow.aborted)) >= 4
    later = [body for body in fast.asked if len(body["input_ids"]) > 2]
    assert later, "a sample that had tokens"
    for body in later:
        done = len(body["input_ids"]) - 2
        assert body["input_ids"][2:] == [7] * done
        assert body["sampling_params"]["max_new_tokens"] + done == 60 + body["input_ids"][0]


def test_a_server_that_only_has_more_to_do_keeps_its_samples(serve: Serve) -> None:
    """It is half as fast, which happens to equal servers too: at most one of its samples is tried elsewhere."""
    fast, other = serve(tick_s=0.005), serve(tick_s=0.012)
    asked = [request(index, 40) for index in range(8)]
    found = generate_on(clients_of(fast, other), asked)
    whole(found, asked)
    assert found.moved <= 1 and len(other.aborted) <= 1 and not found.slow


def test_a_server_that_ends_no_request_on_demand_is_left_and_its_samples_are_drawn_anew(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch_module, "ABORT_S", 0.3)
    fast, deaf = serve(tick_s=0.002), serve(tick_s=5.0, hears_aborts=False)
    asked = [request(index, 40) for index in range(6)]
    found = generate_on(clients_of(fast, deaf), asked)
    whole(found, asked)
    assert isinstance(found.lost[1], ServerHung) and found.may_return == found.slow == {1} and found.again == 3
    assert "rollout.servers.1: it did not end 1 requests within 0.3 s" in str(found.lost[1]), "one is tried first"


class Known(SglangClient):
    """A client of a server that has the weights of the step."""

    def info(self) -> Any:
        return SimpleNamespace(weight_version=VERSION, longest_sequence=1000)


def test_a_sampler_says_who_kept_up_and_gives_a_slow_server_a_sample_to_show_that_it_still_is(serve: Serve) -> None:
    servers = [serve(tick_s=0.002), serve(tick_s=0.2)]
    config = RolloutConfig(server=ServerConfig(url=servers[0].url, max_retries=1))
    clients = [Known(one.url, config.server, key=key) for one, key in zip(servers, ("fast", "slow"), strict=True)]
    sampler = SglangSampler(clients, config, eos_ids=(2,), vocab_size=50, seed=0, masked_share=0.0)
    prompt, none = np.array([1, 3], np.int32), np.zeros(0, np.int32)
    asked = [SampleRequest(str(index), "p", prompt, none, 60, False, None) for index in range(8)]
    for _ in range(2):
        found = sampler.collect(asked, step=0, expected_version=VERSION)
        assert found.keeps_up == {"fast": True, "slow": False} and len(found.rollouts) == 8
    again = sampler.collect([], step=0, expected_version=VERSION, found=found)
    assert again.keeps_up == found.keeps_up, "an answer of the same step is kept"


def test_a_server_whose_answers_are_refused_is_left_with_its_name(serve: Serve) -> None:
    good, stale = serve(), serve(version="old")
    asked = [request(index, 5) for index in range(6)]
    found = generate_on(
        clients_of(good, stale), asked, refuses=lambda answer: None if VERSION in answer.weight_versions else "stale"
    )
    whole(found, asked)
    assert str(found.lost[1]) == "rollout.servers.1: stale" and found.may_return == {1}


def test_a_part_of_refused_weights_is_not_continued(serve: Serve) -> None:
    fast, stale = serve(tick_s=0.002), serve(tick_s=0.2, version="old")
    asked = [request(index, 60) for index in range(6)]
    found = generate_on(
        clients_of(fast, stale), asked, refuses=lambda answer: None if VERSION in answer.weight_versions else "stale"
    )
    whole(found, asked)
    assert 1 in found.lost


@pytest.mark.parametrize("servers", [1, 2])
def test_a_refused_request_is_tried_at_one_other_server_and_then_an_error(serve: Serve, servers: int) -> None:
    refusing = [serve(status=400) for _ in range(servers)]
    found = generate_on(clients_of(*refusing), [request(1, 2)])
    (answer,) = found.answers
    assert isinstance(answer, ServerError) and "answered 400" in str(answer)
    assert sum(len(server.asked) for server in refusing) == servers


def test_a_server_that_refuses_everything_is_left_to_the_others(serve: Serve) -> None:
    refusing, good = serve(status=400), serve()
    asked = [request(index, 3) for index in range(12)]
    found = generate_on(clients_of(refusing, good, at_once=4), asked)
    whole(found, asked)
    assert 0 in found.lost and len(good.asked) == 12


def test_scores_of_a_slow_server_are_made_elsewhere_from_their_beginning(serve: Serve) -> None:
    fast, slow = serve(tick_s=0.001), serve(tick_s=0.5)
    asked = [ScoringRequest(np.arange(3, 10 + index, dtype=np.int32), first=1) for index in range(6)]
    found = score_on(clients_of(fast, slow), asked)
    for scores, question in zip(found.answers, asked, strict=True):
        assert not isinstance(scores, ServerError) and len(scores.logp_N) == len(question.token_ids) - 1
    assert found.moved >= 3 and slow.aborted == []


def test_one_server_is_never_told_to_abort(serve: Serve) -> None:
    server = serve(tick_s=0.05)
    asked = [request(index, 8) for index in range(3)]
    started = time.monotonic()
    whole(generate_on(clients_of(server), asked), asked)
    assert server.aborted == [] and time.monotonic() - started > 0.3


def test_a_server_that_became_slow_counts_so_at_once_and_recovers_step_by_step() -> None:
    speeds = Speeds()
    assert speeds.of("a") == 1.0
    speeds.note({"a": 10.0, "b": 14.0})
    assert speeds.of("a") == speeds.of("b") == 1.0, "noise"
    speeds.note({"a": 1.0, "b": 19.0})
    assert speeds.of("a") == 0.1
    speeds.note({"a": 10.0, "b": 10.0})
    assert 0.5 < speeds.of("a") <= 1.0
