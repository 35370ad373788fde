"""Retries, time-outs, hangs and foreign text between a client and a misbehaving server on loopback."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from tests.http_server import serving
from tropd_mcore import stopping
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import AnswerError, ServerDied, ServerError, ServerHung, StopRequested
from tropd_mcore.serving import transport as transport_module
from tropd_mcore.serving import watch as watch_module
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.transport import _retry_after_s
from tropd_mcore.serving.wire import Generation, GenerationRequest

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LONG_S = 60.0
"""A wait that is longer than any test."""


class Server:
    """Answers /generate by `generate` and all other paths with 200 and {}, unless another answer is given by path."""

    def __init__(self, generate: Handler, **handlers: Handler) -> None:
        self.handlers = {"/generate": generate, **{f"/{path}": handler for path, handler in handlers.items()}}
        self.asked: list[str] = []
        self.url = ""
        self.released = False
        """Releases all held answers, so that the server can be stopped"""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        handler = self.handlers.get(request.path)
        return web.json_response({}) if handler is None else await handler(request)

    def app(self) -> web.Application:
        made = web.Application()
        made[SERVER] = self
        made.router.add_route("*", "/{path:.*}", self.answer)
        return made


SERVER = web.AppKey("server", Server)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:

        def start(generate: Handler, **handlers: Handler) -> Server:
            server = Server(generate, **handlers)
            server.url = stack.enter_context(serving(server.app))
            stack.callback(setattr, server, "released", True)  # before the server stops
            return server

        yield start


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "PROBE_EVERY_S", 0.05)


def good(_request: web.Request) -> web.StreamResponse:
    meta = {
        "finish_reason": {"type": "length"},
        "output_token_logprobs": [[-0.5, 7, None], [-0.5, 8, None]],
        "weight_version": "v1",
    }
    return web.json_response({"output_ids": [7, 8], "meta_info": meta})


async def fine(request: web.Request) -> web.StreamResponse:
    return good(request)


async def hangs(request: web.Request) -> web.StreamResponse:
    end = time.monotonic() + LONG_S
    while time.monotonic() < end and not request.app[SERVER].released:
        await asyncio.sleep(0.02)
    return web.Response()


def then(*answers: Callable[[], web.Response] | None) -> Handler:
    """These answers one after the other, then the last one repeatedly. None: a good answer."""
    left = list(answers)

    async def handle(request: web.Request) -> web.StreamResponse:
        make = left.pop(0) if len(left) > 1 else left[0]
        return good(request) if make is None else make()

    return handle


def client_of(url: str, *, stopped: Callable[[], str | None] | None = None, **config: Any) -> SglangClient:
    values: dict[str, Any] = {"url": url, "max_retries": 2, "hang_timeout_s": LONG_S} | config
    settings = ServerConfig(**values)
    return SglangClient(url, settings, key="rollout.server", stopped=stopped)


ASK = GenerationRequest(np.array([3, 4], np.int32), max_new_tokens=2, vocab_size=50)


def one(client: SglangClient) -> Generation | ServerError:
    (answer,) = client.generate([ASK])
    return answer


def answered(answer: object) -> bool:
    return isinstance(answer, Generation) and answer.output_ids.tolist() == [7, 8]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_a_transient_http_status_is_retried(serve: Callable[..., Server], status: int) -> None:
    client = client_of(serve(then(lambda: web.Response(status=status), None)).url)
    assert answered(one(client)) and client.retries == 1


def test_an_endless_429_is_an_error_that_gives_the_number_of_attempts(serve: Callable[..., Server]) -> None:
    server = serve(then(lambda: web.Response(status=429, body=b"slow down")))
    assert str(one(client_of(server.url))) == (
        "rollout.server: /generate answered 429: slow down (3 attempts; rollout.server.max_retries)"
    )


def test_a_retry_waits_as_long_as_the_server_asks(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within bounds; the liar before it: without the header the wait of this test is 0.01 s."""
    monkeypatch.setattr(transport_module, "LONGEST_RETRY_AFTER_S", 0.6)
    server = serve(then(lambda: web.Response(status=429, headers={"Retry-After": "3600"}), None))
    started = time.monotonic()
    assert answered(one(client_of(server.url)))
    assert 0.6 <= time.monotonic() - started < 60
    server = serve(then(lambda: web.Response(status=429), None))
    assert answered(one(client_of(server.url)))


def test_retry_after_may_be_a_number_or_a_date_and_nonsense_counts_as_zero() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 20 < _retry_after_s(later) <= 30
    assert _retry_after_s("7") == 7 and _retry_after_s("7200") == 60
    assert [_retry_after_s(header) for header in (None, "", "soon", "-5", "nan")] == [0.0] * 5


def test_a_weight_update_is_retried_only_if_the_server_did_nothing(serve: Callable[..., Server]) -> None:
    server = serve(fine, end_weight_update=then(lambda: web.Response(status=429), lambda: web.json_response({})))
    client_of(server.url).end_weight_update()
    assert server.asked.count("/end_weight_update") == 2
    server = serve(fine, end_weight_update=then(lambda: web.Response(status=503)))
    with pytest.raises(ServerError, match=r"answered 503: .*\(1 attempts"):
        client_of(server.url).end_weight_update()
    assert server.asked.count("/end_weight_update") == 1


def test_a_request_that_timed_out_is_retried(serve: Callable[..., Server]) -> None:
    late = [True]

    async def once_late(request: web.Request) -> web.StreamResponse:
        if late.pop() if late else False:
            await hangs(request)
        return good(request)

    client = client_of(serve(once_late).url, request_timeout_s=2.0)
    assert answered(one(client)) and client.retries == 1


def test_a_request_that_never_ends_is_an_error_even_while_others_are_answered(serve: Callable[..., Server]) -> None:
    """It costs only its own sample, not the server."""

    async def some(request: web.Request) -> web.StreamResponse:
        if (await request.json())["input_ids"] == [9]:
            await hangs(request)
        await asyncio.sleep(0.2)
        return good(request)

    slow = GenerationRequest(np.array([9], np.int32), max_new_tokens=9, vocab_size=50)
    client = client_of(serve(some).url, request_timeout_s=1.0, max_retries=1, max_concurrency=2)
    answers = client.generate([slow, *[ASK] * 30])
    assert isinstance(answers[0], ServerError) and not isinstance(answers[0], ServerDied)
    assert "within request_timeout_s=1 s (2 attempts; rollout.server.max_retries)" in str(answers[0])
    assert all(answered(answer) for answer in answers[1:])


def test_a_server_that_answers_no_request_counts_as_hung_even_if_it_reports_health(
    serve: Callable[..., Server],
) -> None:
    server = serve(hangs)
    answers = client_of(server.url, request_timeout_s=0.5, max_retries=1, max_concurrency=2).generate([ASK] * 9)
    assert all(isinstance(answer, ServerDied) for answer in answers)
    assert "; no other request was answered meanwhile" in str(answers[0])
    assert server.asked.count("/generate") <= 6, "the others were not tried one after the other"


def test_a_silent_server_is_detected_before_its_requests_time_out(serve: Callable[..., Server]) -> None:
    """Without the probe, the requests would wait for request_timeout_s."""
    client = client_of(serve(hangs, model_info=hangs).url, hang_timeout_s=0.5, request_timeout_s=LONG_S)
    error = one(client)
    assert isinstance(error, ServerHung)
    assert str(error).startswith("rollout.server: hung: no answer of /model_info for ")
    assert f"(at {client.url}; rollout.server.hang_timeout_s=0.5)" in str(error)


def test_answers_received_before_a_server_hung_are_kept(serve: Callable[..., Server]) -> None:
    async def some(request: web.Request) -> web.StreamResponse:
        if (await request.json())["input_ids"] == [9]:
            await hangs(request)
        return good(request)

    slow = GenerationRequest(np.array([9], np.int32), max_new_tokens=2, vocab_size=50)
    client = client_of(serve(some, model_info=hangs).url, hang_timeout_s=1.0, request_timeout_s=LONG_S)
    first, *others = client.generate([slow, ASK, ASK])
    assert isinstance(first, ServerHung) and all(answered(other) for other in others)


@pytest.mark.parametrize("health", [200, 500, None])
def test_a_slow_server_that_still_answers_probes_does_not_count_as_hung(
    serve: Callable[..., Server], health: int | None
) -> None:
    """Longer than for a silent server, whatever its health status. A busy engine is silent for up to 20 s."""

    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(5.0)
        return good(request)

    async def healthy(request: web.Request) -> web.StreamResponse:
        return await hangs(request) if health is None else web.Response(status=health)

    assert answered(one(client_of(serve(slow, health=healthy).url, hang_timeout_s=2.0)))


def test_a_stalled_engine_is_given_more_time_than_a_silent_server(serve: Callable[..., Server]) -> None:
    async def unwell(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    started = time.monotonic()
    error = one(client_of(serve(hangs, health=unwell).url, hang_timeout_s=0.2, request_timeout_s=LONG_S))
    assert isinstance(error, ServerHung) and "its engine has given nothing for" in str(error)
    assert time.monotonic() - started >= watch_module.ENGINE_FACTOR * 0.2


def test_a_suspended_process_behind_an_answering_server_is_found_and_named(serve: Callable[..., Server]) -> None:
    """The HTTP process runs and the scheduler is suspended. Also during a weight update."""
    words = "a process of it (77) is stopped (state T)"
    server = serve(hangs, update_weights_from_tensor=hangs)
    client = client_of(server.url, hang_timeout_s=0.3, request_timeout_s=LONG_S, stopped=lambda: words)
    error = one(client)
    assert isinstance(error, ServerHung) and f"rollout.server: hung: {words}, for " in str(error)
    with pytest.raises(ServerHung, match="state T"):
        client.update_weights([b"x"], version="v")


def test_a_server_silent_in_an_update_is_detected_and_a_slow_load_is_tolerated(
    serve: Callable[..., Server],
) -> None:
    """While we pause it, /health would wait for the engine. Another path shows that it is alive."""

    async def loads(_request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(5.0)
        return web.json_response({"success": True})

    server = serve(fine, update_weights_from_tensor=loads, health=hangs)
    client_of(server.url, hang_timeout_s=2.0).update_weights([b"x"], version="v")
    assert "/health" not in server.asked and "/model_info" in server.asked
    server = serve(fine, update_weights_from_tensor=hangs, model_info=hangs)
    with pytest.raises(ServerHung, match="no answer of /model_info for"):
        client_of(server.url, hang_timeout_s=0.5, request_timeout_s=LONG_S).update_weights([b"x"], version="v")


def test_the_time_limit_of_an_update_by_value_grows_with_its_size(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers nothing meanwhile; the liar before it: the same server with a body that is read at once."""

    async def loads(_request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3.0)
        return web.json_response({"success": True})

    server = serve(fine, update_weights_from_tensor=loads, model_info=hangs)
    client = client_of(server.url, hang_timeout_s=0.5)
    with pytest.raises(ServerHung):
        client.update_weights([b"x" * 1000], version="v")
    monkeypatch.setattr(transport_module, "SLOWEST_READING", 10)
    client.update_weights([b"x" * 1000], version="v")


def test_a_late_probe_by_a_process_that_was_itself_suspended_proves_nothing() -> None:
    streak = watch_module._Streak(since=0.0)
    streak.note(True, now=3600.0)
    assert not streak.lasts(60.0, now=3600.0)
    streak.note(True, now=3605.0)
    assert streak.lasts(60.0, now=3605.0)
    streak.note(False, now=3606.0)
    assert not streak.lasts(60.0, now=3666.0)


def test_a_request_to_stop_ends_the_wait_for_answers_at_once(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(serve(hangs).url, request_timeout_s=LONG_S)
    asked = threading.Timer(0.3, lambda: monkeypatch.setattr(stopping, "_asked", "SIGTERM"))
    asked.start()
    started = time.monotonic()
    with pytest.raises(StopRequested, match="SIGTERM"):
        client.generate([ASK] * 3)
    assert time.monotonic() - started < LONG_S / 2
    asked.join()


def test_a_request_to_stop_does_not_interrupt_a_weight_update(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(_request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.6)
        return web.json_response({"success": True})

    monkeypatch.setattr(stopping, "_asked", "SIGTERM")
    client_of(serve(fine, update_weights_from_tensor=slow).url).update_weights([b"x"], version="v")


def test_an_exception_of_our_own_code_is_raised_unchanged(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for the others."""

    def breaks(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("tropd_mcore.serving.wire.read_generation", breaks)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        client_of(serve(fine).url).generate([ASK] * 2)


HTML = b"<html>\n<body>502 Bad \x1b[2JGateway</body></html>"


def test_an_answer_that_is_a_web_page_is_shown_with_its_content_type_and_beginning(
    serve: Callable[..., Server],
) -> None:
    async def page(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=HTML, content_type="text/html")

    server = serve(page, server_info=page, end_weight_update=page)
    client = client_of(server.url)
    error = one(client)
    assert isinstance(error, AnswerError)
    assert str(error) == (
        "rollout.server: /generate answered text/html '<html> <body>502 Bad \\x1b[2JGateway</body></html>'; "
        f"expected JSON: is a proxy or another service at this url? ({server.url})"
    )
    for ask in (client.info, client.end_weight_update):
        with pytest.raises(ServerError, match="answered text/html .*expected JSON"):
            ask()


def test_a_redirect_is_refused_and_its_target_named(serve: Callable[..., Server]) -> None:
    """Following it would send the key to another server."""

    async def elsewhere(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": "http://login.example/"})

    error = one(client_of(serve(elsewhere).url))
    assert "answered 302, a redirect to 'http://login.example/'; is a proxy or another service at this url?" in str(
        error
    )


def test_a_server_that_redirects_is_not_healthy_and_its_target_is_not_asked(serve: Callable[..., Server]) -> None:
    other = serve(fine)

    async def elsewhere(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": f"{other.url}/health"})

    assert not client_of(serve(fine, health=elsewhere).url).healthy()
    assert other.asked == [] and client_of(other.url).healthy()


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503, 418])
def test_no_text_of_a_server_reaches_the_log_or_a_message_as_more_than_one_printable_line(
    serve: Callable[..., Server], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Escapes that rename the terminal, a second line that looks like ours, characters that turn the text around."""
    body = "\x1b]0;owned\x07 no\r\nerror: all is lost\u2028x\u202egnp.exe".encode()

    async def hostile(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body)

    with caplog.at_level(logging.DEBUG, logger="tropd_mcore"):
        error = one(client_of(serve(hostile).url))
    assert isinstance(error, ServerError)
    for line in (str(error), *(record.getMessage() for record in caplog.records)):
        assert line.isprintable(), repr(line)


def test_values_that_a_server_reports_about_itself_are_made_printable(serve: Callable[..., Server]) -> None:
    async def info(_request: web.Request) -> web.StreamResponse:
        return web.json_response(
            {
                "max_req_input_len": 500,
                "tp_size": 1,
                "version": "\x1b[31m0.5",
                "weight_version": "v1\nerror: x",
                "model_path": "/m\x07",
                "dtype": "\x1b]0;x",
            }
        )

    found = client_of(serve(fine, server_info=info, model_info=info).url).info()
    assert found.version == "\\x1b[31m0.5" and found.weight_version == "v1 error: x"
    assert found.model_path == "/m\\x07" and found.dtype.isprintable()


def test_proxies_from_the_environment_are_not_used(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The liar: nothing listens on the port of the proxy."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    client = client_of(serve(fine).url)
    assert answered(one(client)) and client.healthy()
