"""A client of one SGLang server: sampling, scoring and weight updates, from plain synchronous code.

Not for starting servers (see `process`) or for deciding what to do when one is gone (see `supervisor`). Invariant:
connection errors and 5xx answers are retried a bounded number of times with growing waits, 4xx answers never; what
comes back is checked (see `wire`), asked for once more where it makes no sense, and is an AnswerError after that. Each
call runs its own event loop: not for use inside one.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable, Coroutine
from typing import TypeVar

import aiohttp
import tenacity

from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import AnswerError, ServerDied, ServerError
from tropd_mcore.serving import wire
from tropd_mcore.serving.environment import read_api_key

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Question = TypeVar("Question")

HEALTH_TIMEOUT_S = 30.0
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0


class _PassingError(ServerError):
    """A failure that may be gone at the next attempt."""


class _UnreachableError(_PassingError):
    """No connection, or one that broke."""


class _MissingError(ServerError):
    """The server does not know the path."""


class _RefusedError(ServerError):
    """The server does not do it, or not for this key."""


class SglangClient:
    """Talks to the server at `url`. `key` is the section that configures it, for messages (`rollout.server`).

    `alive` tells whether the process of a started server runs; once it does not, nothing is retried. Such a server
    listens on loopback and has no API key; `api_key_env` is for one that runs elsewhere.
    """

    def __init__(self, url: str, config: ServerConfig, *, key: str, alive: Callable[[], bool] | None = None) -> None:
        self.url = url.rstrip("/")
        self.key = key
        self.retries = 0
        """Attempts beyond the first, over the client's life."""
        self.asked_again = 0
        """Answers that made no sense and were asked for once more, over the client's life."""
        self.same_host = alive is not None
        """Whether the server shares this host's memory, as one that we started does."""
        self._told_refusal = False
        self._config = config
        self._alive = alive
        self._api_key = read_api_key(config.api_key_env, key=f"{key}.api_key_env") if config.url else None

    def healthy(self) -> bool:
        """Return whether the server generates: False while it starts, is paused or does not answer."""

        async def ask(session: aiohttp.ClientSession) -> bool:
            try:
                async with session.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(HEALTH_TIMEOUT_S)) as answer:
                    return answer.status == 200
            except (aiohttp.ClientError, TimeoutError, OSError):
                return False

        return self._run(ask)

    def info(self) -> wire.ServerInfo:
        """Return version label, tensor-parallel size and limits of the server. Raises ServerError."""

        async def ask(session: aiohttp.ClientSession) -> wire.ServerInfo:
            server = await self._call(session, "GET", "/server_info")
            return wire.read_server_info(server, await self._call(session, "GET", "/model_info"))

        return self._run(ask)

    def generate(self, requests: list[wire.GenerationRequest]) -> list[wire.Generation | ServerError]:
        """Sample each request; entry i is the continuation of request i, or why there is none.

        At most `max_concurrency` are in flight. Token ids must be inside the vocabulary: SGLang dies of others.
        """
        return self._generate_all(requests, wire.generation_body, wire.read_generation)

    def score(self, requests: list[wire.ScoringRequest]) -> list[wire.TokenScores | ServerError]:
        """Score each request at temperature 1; entry i holds the scores of request i, or why there are none."""
        return self._generate_all(requests, wire.scoring_body, wire.read_scores)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the ids that the server makes of each text, without special tokens around it.

        Raises ServerError where the server has no /tokenize (older than SGLang 0.5.23) or answers something else.
        """
        answer = self._post("/tokenize", {"prompt": list(texts), "add_special_tokens": False}, retry=False)
        return wire.read_token_lists(answer, len(texts))

    def pause(self) -> None:
        """Abort what runs and hold back new requests until `resume`."""
        self._post("/pause_generation", {"mode": "abort"})

    def resume(self) -> None:
        """Take requests again; harmless where the server was not paused."""
        self._post("/continue_generation", {})

    def flush_cache(self) -> None:
        """Forget all cached KV. Raises ServerError while requests run."""
        self._post("/flush_cache", {})

    def begin_weight_update(self) -> None:
        """Open the update session; one that an earlier failure left open is closed first."""
        try:
            self._post("/begin_weight_update", {}, retry=False)
        except ServerError as error:
            if "already open" not in str(error):
                raise
            log.warning("%s: closing the weight-update session that an earlier update left open", self.key)
            self._post("/end_weight_update", {}, retry=False)
            self._post("/begin_weight_update", {}, retry=False)

    def update_weights(self, payloads: list[bytes], *, version: str) -> None:
        """Load one payload a rank (see `weight_payload`) and label the server's weights `version`; never retried.

        The server ignores unknown names and dies of wrong shapes: check both before (see `rollout.publisher`). Raises
        ServerError where the server refuses.
        """
        self._post("/update_weights_from_tensor", wire.weights_body(payloads, version=version), retry=False)

    def end_weight_update(self) -> None:
        """Close the update session."""
        self._post("/end_weight_update", {}, retry=False)

    def label_weights(self, version: str) -> None:
        """Give the weights that the server holds the label `version`, which it stamps on what it samples."""
        self._post("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def weights_checksum(self, *, may_refuse: bool = False) -> wire.WeightChecksums | None:
        """Return checksums of all weights on all ranks, None where the server has none to give (no /weights_checker).

        Equal weights have equal ones on servers of one layout. Cost: SGLang reads every weight once (SHA-256 on a CPU,
        about 1 GiB/s; a kernel at memory speed on a GPU). Raises ServerError. `may_refuse`: a refusal (SGLang wants its
        admin key here, if it has one) is None too, with one warning; for a server that need not take weights from us.
        """
        try:
            answer = self._post("/weights_checker", {"action": "checksum"})
        except _MissingError:
            return None
        except _RefusedError as error:
            if not may_refuse:
                raise
            if not self._told_refusal:
                log.warning(
                    "%s: the server gives no checksum of its weights, so its scores alone tell which model it serves "
                    "(%s). If it has an admin key, let %s.api_key_env name that",
                    self.key,
                    error,
                    self.key,
                )
            self._told_refusal = True
            return None
        checksums = wire.read_checksums(answer)
        if checksums is None:
            raise ServerError(f"{self.key}: /weights_checker answered no per_engine_checksum; expected SGLang 0.5.23")
        return checksums

    def randomize_weights(self) -> None:
        """Overwrite every weight of the server with random numbers, to prove that the next update sets them all."""
        self._post("/weights_checker", {"action": "reset_tensors"})

    def _post(self, path: str, body: wire.Json | bytes, *, retry: bool = True) -> object:
        return self._run(lambda session: self._call(session, "POST", path, body, retry=retry))

    def _run(self, call: Callable[[aiohttp.ClientSession], Coroutine[None, None, Answer]]) -> Answer:
        async def with_session() -> Answer:
            headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
            connector = aiohttp.TCPConnector(limit=self._config.max_concurrency)
            timeout = aiohttp.ClientTimeout(total=self._config.request_timeout_s)
            async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
                return await call(session)

        return asyncio.run(with_session())

    def _generate_all(
        self,
        questions: list[Question],
        body_of: Callable[[Question], wire.Json],
        read: Callable[[object, Question], Answer],
    ) -> list[Answer | ServerError]:
        """What `read` makes of the answer of /generate to each question, or why there is none.

        An answer that makes no sense is asked for once more, and one line is logged about all of them.
        """
        nonsense: list[str] = []

        async def ask(session: aiohttp.ClientSession, question: Question) -> Answer:
            body = body_of(question)
            try:
                return read(await self._call(session, "POST", "/generate", body), question)
            except AnswerError as error:
                nonsense.append(str(error))
            return read(await self._call(session, "POST", "/generate", body), question)

        answers = self._run(lambda session: self._gather([ask(session, question) for question in questions]))
        self.asked_again += len(nonsense)
        if nonsense:
            log.warning(
                "%s: %d of %d answers made no sense and were asked for once more; the first: %s",
                self.key,
                len(nonsense),
                len(questions),
                nonsense[0],
            )
        return answers

    async def _gather(self, calls: list[Coroutine[None, None, Answer]]) -> list[Answer | ServerError]:
        slots = asyncio.Semaphore(self._config.max_concurrency)

        async def caught(call: Coroutine[None, None, Answer]) -> Answer | ServerError:
            async with slots:
                try:
                    return await call
                except ServerError as error:
                    return error

        return await asyncio.gather(*(caught(call) for call in calls))

    async def _call(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        body: wire.Json | bytes | None = None,
        *,
        retry: bool = True,
    ) -> object:
        """One request with its retries; the decoded answer."""
        attempts = self._config.max_retries + 1 if retry else 1
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_PassingError),
            stop=tenacity.stop_after_attempt(attempts),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            return await retrying(self._attempt, session, method, path, body)
        except _UnreachableError as error:
            raise ServerDied(f"{error} ({attempts} attempts; {self.key}.max_retries)") from error
        except _PassingError as error:
            raise ServerError(f"{error} ({attempts} attempts; {self.key}.max_retries)") from error

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        self.retries += 1
        log.warning("%s; attempt %d follows", state.outcome.exception(), state.attempt_number + 1)

    async def _attempt(
        self, session: aiohttp.ClientSession, method: str, path: str, body: wire.Json | bytes | None
    ) -> object:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        try:
            stream = io.BytesIO(data) if data is not None else None
            async with session.request(method, f"{self.url}{path}", data=stream, headers=headers) as answer:
                return self._checked(path, answer.status, await answer.read())
        except TimeoutError as error:
            seconds = self._config.request_timeout_s
            raise ServerError(
                f"{self.key}: no answer of {path} at {self.url} within request_timeout_s={seconds:g} s"
            ) from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as error:
            problem = f"{self.key}: no connection to {self.url}{path}: {error or type(error).__name__}"
            if self._alive is not None and not self._alive():
                raise ServerDied(f"{problem}; its process has ended") from error
            raise _UnreachableError(problem) from error

    def _checked(self, path: str, status: int, content: bytes) -> object:
        if status == 200:
            if not content.strip().startswith((b"{", b"[")):
                return None
            try:
                return json.loads(content)
            except ValueError as error:
                raise _PassingError(f"{self.key}: {path} answered JSON that cannot be read: {error}") from error
        detail = _message(content)
        if status >= 500:
            raise _PassingError(f"{self.key}: {path} answered {status}: {detail}")
        if status in (401, 403):
            raise _RefusedError(
                f"{self.key}: {path} answered {status}: check the key that api_key_env names ({detail})"
            )
        if status == 404:
            raise _MissingError(f"{self.key}: the server at {self.url} has no {path}: expected SGLang 0.5.23 or newer")
        if status in (400, 405):
            raise _RefusedError(f"{self.key}: {path} answered {status}: {detail}")
        raise ServerError(f"{self.key}: {path} answered {status}: {detail}")


def _message(content: bytes) -> str:
    """The server's own words, one line, at most 300 characters."""
    text = content.decode(errors="replace")
    try:
        answer = json.loads(text)
    except ValueError:
        answer = text
    if isinstance(answer, dict):
        answer = answer.get("error") or answer
        answer = answer.get("message", answer) if isinstance(answer, dict) else answer
    return " ".join(str(answer).split())[:300]
