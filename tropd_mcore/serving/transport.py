"""HTTP requests to one server: retries, time-outs, keys, and a watch that finds a hung server while requests wait.

This module does not build requests or interpret answers (see `client` and `wire`). Invariants: connection errors,
time-outs and the answers 408, 425, 429 and 5xx are retried a bounded number of times with growing waits; other answers
are never retried. A hung server is detected in hang_timeout_s (see `watch`). Proxies of the environment are ignored and
redirects are not followed. Text from a server appears in messages as one printable line. Each call runs its own event
loop.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import aiohttp
import tenacity

from tropd_mcore import stopping
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import AnswerError, ServerDied, ServerError, ServerHung
from tropd_mcore.foreign_text import one_line, quoted
from tropd_mcore.serving import wire
from tropd_mcore.serving.watch import Watched, hang

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
LONGEST_RETRY_AFTER_S = 60.0
"""Longest wait that a Retry-After header can cause."""
STOP_POLL_S = 0.25
"""Seconds between two checks for a stop request."""
SLOWEST_READING = 16 * 2**20
"""Lowest rate, in bytes per second, at which a server parses a request body. Parsing JSON blocks its HTTP process."""
SPARE_CONNECTIONS = 4
BUSY_STATUS = (408, 425, 429)
"""Status codes that mean that the server has done nothing yet, so that any request can be repeated."""
NOT_SGLANG = "is a proxy or another service at this url?"


class _PassingError(ServerError):
    """A failure that may not recur at the next attempt; `wait_s` is the wait that the server asked for."""

    wait_s: float = 0.0


class _BusyError(_PassingError):
    """The server did nothing and asks for a later attempt."""


class LateError(_PassingError):
    """No answer within request_timeout_s."""


class _UnreachableError(_PassingError):
    """No connection, or a broken one."""


class MissingError(ServerError):
    """The server does not have the requested path."""


class ConflictError(ServerError):
    """The server has already what the request would make."""


class RefusedError(ServerError):
    """The server refuses the request, or refuses it for this key."""


@dataclass(frozen=True)
class Endpoint:
    """Address, key and configuration of the server; see `SglangClient`."""

    url: str
    config: ServerConfig
    key: str
    """Configuration section, for the keys in messages"""
    name: str
    """Prefix of messages"""
    alive: Callable[[], bool] | None = None
    stopped: Callable[[], str | None] | None = None
    api_key: str | None = field(default=None, repr=False)
    beside: Callable[[], Coroutine[None, None, ServerDied]] | None = None
    """Runs beside each `dispatch`. If it returns, the server is lost with the error that it returns"""
    expected: str = "SGLang 0.5.23 or newer"
    """What should answer at `url`, for the message about a path that it does not have"""


class Transport:
    """Requests to one server."""

    def __init__(self, to: Endpoint) -> None:
        self.retries = 0
        """Number of retries so far."""
        self.url, self.key, self.name = to.url, to.key, to.name
        self._to = to
        self._config = to.config

    def run(
        self,
        call: Callable[[aiohttp.ClientSession], Coroutine[None, None, Answer]],
        *,
        watched: bool = True,
        may_stop: bool = False,
        limit_s: float | None = None,
        body_bytes: int = 0,
    ) -> Answer:
        """Run `call`, which sends `body_bytes`, in its own event loop.

        Raises what `call` raises, ServerHung if `watched`, and StopRequested if `may_stop`.
        """
        busy_s = body_bytes / SLOWEST_READING

        async def with_session() -> Answer:
            async with self.session(limit_s) as session:
                dangers = [self.hung(generates=False, busy_s=busy_s)] if watched else []
                return await attended(call(session), dangers, may_stop=may_stop)

        return asyncio.run(with_session())

    @property
    def beside(self) -> Callable[[], Coroutine[None, None, ServerDied]] | None:
        """What runs beside each `dispatch`, if anything."""
        return self._to.beside

    @property
    def max_concurrency(self) -> int:
        """Most requests in flight."""
        return self._config.max_concurrency

    def session(self, limit_s: float | None = None) -> aiohttp.ClientSession:
        """Return a session of the running event loop; a request may take `limit_s` (default: request_timeout_s)."""
        # a few connections beside those of generation, for aborts
        connector = aiohttp.TCPConnector(limit=self._config.max_concurrency + SPARE_CONNECTIONS)
        timeout = aiohttp.ClientTimeout(total=limit_s or self._config.request_timeout_s)
        return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers())

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._to.api_key}"} if self._to.api_key else {}

    async def hung(self, *, generates: bool, busy_s: float = 0.0) -> ServerDied:
        """Wait until the server is hung, then return the error."""
        limit_s = self._config.hang_timeout_s
        reason = await hang(Watched(self.url, limit_s, generates, self._headers(), self._to.stopped, busy_s))
        return ServerHung(f"{self.name}: {reason} (at {self.url}; {self.key}.hang_timeout_s={limit_s:g})", self.url)

    async def call(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        body: wire.Json | bytes | None = None,
        *,
        retry: bool = True,
        json_answer: bool = True,
        accepted: int = 200,
    ) -> object:
        """Send one request, with retries, and return the decoded answer. `accepted` is the status of a good one.

        With `retry=False`, it is repeated only if the server said that it has done nothing yet.
        """
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_PassingError if retry else _BusyError),
            stop=tenacity.stop_after_attempt(self._config.max_retries + 1),
            wait=_wait_s,
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            return await retrying(self._attempt, session, method, path, body, json_answer, accepted)
        except _PassingError as error:
            attempts = retrying.statistics["attempt_number"]
            message = f"{error} ({attempts} attempts; {self.key}.max_retries)"
            died = isinstance(error, _UnreachableError)
            raise (ServerDied(message, self.url) if died else ServerError(message)) from error

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        self.retries += 1
        log.warning("%s; attempt %d follows", state.outcome.exception(), state.attempt_number + 1)

    async def _attempt(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        body: wire.Json | bytes | None,
        json_answer: bool,
        accepted: int,
    ) -> object:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        try:
            stream = io.BytesIO(data) if data is not None else None
            async with session.request(
                method, f"{self.url}{path}", data=stream, headers=headers, allow_redirects=False
            ) as answer:
                return self._checked(path, answer, await answer.read(), json_answer=json_answer, accepted=accepted)
        except TimeoutError as error:
            seconds = session.timeout.total or 0.0
            raise LateError(
                f"{self.name}: no answer of {path} at {self.url} within request_timeout_s={seconds:g} s"
            ) from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as error:
            found = one_line(error) or type(error).__name__
            problem = f"{self.name}: no connection to {self.url}{path}: {found}"
            if self._to.alive is not None and not self._to.alive():
                raise ServerDied(f"{problem}; its process has ended", self.url) from error
            raise _UnreachableError(problem) from error
        except aiohttp.ClientError as error:
            # an invalid URL, or an answer that is not HTTP
            raise ServerError(
                f"{self.name}: the request to {self.url}{path} failed: {one_line(error)}; {NOT_SGLANG}"
            ) from error

    def _checked(
        self, path: str, answer: aiohttp.ClientResponse, content: bytes, *, json_answer: bool, accepted: int
    ) -> object:
        """Decode an answer. Raises the error of its status, or AnswerError if it is not the expected JSON."""
        status, said = answer.status, f"{self.name}: {path} answered {answer.status}"
        if status == accepted:
            return self._decoded(path, answer.content_type, content) if json_answer else None
        detail = _message(content)
        if status >= 500 or status in BUSY_STATUS:
            busy = _BusyError if status in BUSY_STATUS else _PassingError
            error = busy(f"{said}: {detail}")
            error.wait_s = _retry_after_s(answer.headers.get("Retry-After"))
            raise error
        if status in (401, 403):
            whose = "check the key that api_key_env names" if self._config.url else "it rejects the key we gave it"
            raise RefusedError(f"{said}: {whose} ({detail})")
        if status == 404:
            raise MissingError(f"{self.name}: the server at {self.url} has no {path}: expected {self._to.expected}")
        if status == 409:
            raise ConflictError(f"{said}: {detail}")
        if status in (400, 405):
            raise RefusedError(f"{said}: {detail}")
        if 300 <= status < 400:
            target = quoted(answer.headers.get("Location", ""), 100)
            raise ServerError(f"{said}, a redirect to {target}; {NOT_SGLANG} ({self.url})")
        raise ServerError(f"{said}: {detail}")

    def _decoded(self, path: str, content_type: str, content: bytes) -> object:
        """Decode the JSON of an answer with status 200."""
        try:
            return json.loads(content)
        except ValueError as error:
            if content.lstrip().startswith((b"{", b"[")):
                raise _PassingError(
                    f"{self.name}: {path} answered JSON that cannot be read: {one_line(error)}"
                ) from error
        start = quoted(content[:400].decode(errors="replace"), 60)
        raise AnswerError(
            f"{self.name}: {path} answered {one_line(content_type, 60)} {start}; expected JSON: {NOT_SGLANG} "
            f"({self.url})"
        )


async def attended(
    work: Awaitable[Answer],
    dangers: Sequence[Coroutine[None, None, ServerDied] | asyncio.Future[ServerDied]],
    *,
    may_stop: bool,
) -> Answer:
    """Return the result of `work`. If one of `dangers` ends first, raise the error that it returns.

    With `may_stop`, a stop request ends the wait with StopRequested. Everything that has not ended is cancelled.
    """
    task = asyncio.ensure_future(work)
    guards = [asyncio.ensure_future(danger) for danger in dangers]
    try:
        while not task.done():
            await asyncio.wait([task, *guards], timeout=STOP_POLL_S, return_when=asyncio.FIRST_COMPLETED)
            ended = next((guard for guard in guards if guard.done()), None)
            if ended is not None and not task.done():
                raise ended.result()
            if may_stop:
                stopping.check()
        return task.result()
    finally:
        await cancelled([task, *guards])


async def cancelled(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel all unfinished tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _wait_s(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt: grows with each attempt, and is at least what the server asked for."""
    growing = tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)(state)
    error = state.outcome.exception() if state.outcome is not None else None
    return max(growing, error.wait_s) if isinstance(error, _PassingError) else growing


def _retry_after_s(header: str | None) -> float:
    """Seconds of a Retry-After header (number or date), at most LONGEST_RETRY_AFTER_S; 0 if missing or unusable."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 0.0
    # false for NaN
    return min(seconds, LONGEST_RETRY_AFTER_S) if seconds > 0 else 0.0


def _message(content: bytes) -> str:
    """The error text of an answer, as one line of at most 300 characters."""
    text = content.decode(errors="replace")
    try:
        answer = json.loads(text)
    except ValueError:
        answer = text
    if isinstance(answer, dict):
        answer = answer.get("error") or answer
        answer = answer.get("message", answer) if isinstance(answer, dict) else answer
    return one_line(answer)
