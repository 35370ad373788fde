"""A client of one SGLang server: sampling, scoring and weight updates, from plain synchronous code.

Not for starting servers (see `process`), for retries and hangs (see `transport`) or for deciding what to do when a
server is gone (see `supervisor`). Invariant: what comes back is checked (see `wire`), asked for once more if it makes
no sense, and is an AnswerError after that. Each call runs its own event loop: not for use inside one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import aiohttp

from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import AnswerError, ServerError
from tropd_mcore.progress import progress
from tropd_mcore.serving import wire
from tropd_mcore.serving.environment import read_api_key
from tropd_mcore.serving.transport import Endpoint, MissingError, RefusedError, Transport

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Question = TypeVar("Question")

HEALTH_TIMEOUT_S = 30.0


class SglangClient:
    """Talks to the server at `url`. `key` is the section that configures it, for messages (`rollout.server`).

    `alive` tells whether the process of a started server runs; once it does not, nothing is retried. `stopped` tells
    which of its processes is stopped, and `api_key` is the one that it was given; for a server that runs elsewhere
    `api_key_env` names it. `name` is what messages begin with, the key unless given.
    """

    def __init__(
        self,
        url: str,
        config: ServerConfig,
        *,
        key: str,
        name: str | None = None,
        alive: Callable[[], bool] | None = None,
        stopped: Callable[[], str | None] | None = None,
        api_key: str | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.key = key
        self.name = name or key
        self.asked_again = 0
        """Answers that made no sense and were asked for once more, over the client's life."""
        self.same_host = alive is not None
        """Whether the server shares this host's memory, as one that we started does."""
        self._told_refusal = False
        if api_key is None and config.url:
            api_key = read_api_key(config.api_key_env, key=f"{key}.api_key_env")
        self._http = Transport(Endpoint(self.url, config, key, self.name, alive, stopped, api_key))

    @property
    def retries(self) -> int:
        """Attempts beyond the first, over the client's life."""
        return self._http.retries

    def healthy(self, timeout_s: float = HEALTH_TIMEOUT_S) -> bool:
        """Return whether the server generates: False while it starts, is paused or does not answer.

        Raises StopRequested.
        """

        async def ask(session: aiohttp.ClientSession) -> bool:
            try:
                timeout = aiohttp.ClientTimeout(timeout_s)
                async with session.get(f"{self.url}/health", timeout=timeout, allow_redirects=False) as answer:
                    return answer.status == 200
            except (aiohttp.ClientError, TimeoutError, OSError):
                return False

        return self._http.run(ask, watched=False, may_stop=True)

    def info(self) -> wire.ServerInfo:
        """Return version label, tensor-parallel size and limits of the server. Raises ServerError."""

        async def ask(session: aiohttp.ClientSession) -> wire.ServerInfo:
            server = await self._http.call(session, "GET", "/server_info")
            return wire.read_server_info(server, await self._http.call(session, "GET", "/model_info"))

        return self._http.run(ask)

    def generate(self, requests: list[wire.GenerationRequest]) -> list[wire.Generation | ServerError]:
        """Sample each request; entry i is the continuation of request i, or why there is none.

        At most `max_concurrency` are in flight. Token ids must be inside the vocabulary: SGLang dies of others.
        """
        with progress(log, self.name, total=len(requests), unit="responses", amount_unit="tok") as state:
            longest = 0

            def count(answer: wire.Generation | ServerError) -> None:
                nonlocal longest
                tokens = 0 if isinstance(answer, ServerError) else len(answer.output_ids)
                longest = max(longest, tokens)
                state.advance(note=f"longest {longest}", amount=tokens)

            return self._generate_all(requests, wire.generation_body, wire.read_generation, count)

    def score(self, requests: list[wire.ScoringRequest]) -> list[wire.TokenScores | ServerError]:
        """Score each request at temperature 1; entry i holds the scores of request i, or why there are none."""
        with progress(log, self.name, total=len(requests), unit="samples scored", amount_unit="tok") as state:

            def count(answer: wire.TokenScores | ServerError) -> None:
                state.advance(amount=0 if isinstance(answer, ServerError) else len(answer.logp_N))

            return self._generate_all(requests, wire.scoring_body, wire.read_scores, count)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the ids that the server makes of each text, without special tokens around it.

        Raises ServerError where the server has no /tokenize (older than SGLang 0.5.23) or answers something else.
        """
        answer = self._post("/tokenize", {"prompt": list(texts), "add_special_tokens": False}, retry=False)
        return wire.read_token_lists(answer, len(texts))

    def pause(self) -> None:
        """Abort what runs and hold back new requests until `resume`."""
        self._post("/pause_generation", {"mode": "abort"})

    def resume(self, limit_s: float | None = None) -> None:
        """Take requests again; harmless where the server was not paused. With `limit_s` there is one try, so long."""
        self._post("/continue_generation", {}, retry=limit_s is None, limit_s=limit_s)

    def flush_cache(self) -> None:
        """Forget all cached KV. Raises ServerError while requests run."""
        self._post("/flush_cache", {}, json_answer=False)

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

    def end_weight_update(self, limit_s: float | None = None) -> None:
        """Close the update session, within `limit_s` (request_timeout_s)."""
        self._post("/end_weight_update", {}, retry=False, limit_s=limit_s)

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
        except MissingError:
            return None
        except RefusedError as error:
            if not may_refuse:
                raise
            if not self._told_refusal:
                log.warning(
                    "%s: the server gives no checksum of its weights, so its scores alone tell which model it serves "
                    "(%s). If it has an admin key, let %s.api_key_env name that",
                    self.name,
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

    def _post(
        self,
        path: str,
        body: wire.Json | bytes,
        *,
        retry: bool = True,
        json_answer: bool = True,
        limit_s: float | None = None,
    ) -> object:
        return self._http.run(
            lambda session: self._http.call(session, "POST", path, body, retry=retry, json_answer=json_answer),
            limit_s=limit_s,
            body_bytes=len(body) if isinstance(body, bytes) else 0,
        )

    def _generate_all(
        self,
        questions: list[Question],
        body_of: Callable[[Question], wire.Json],
        read: Callable[[object, Question], Answer],
        count: Callable[[Answer | ServerError], None],
    ) -> list[Answer | ServerError]:
        """What `read` makes of the answer of /generate to each question, or why there is none.

        `count` is told of each as it comes. An answer that makes no sense is asked for once more, and one line is
        logged about all of them.
        """
        nonsense: list[str] = []

        async def ask(session: aiohttp.ClientSession, question: Question) -> Answer:
            body = body_of(question)
            try:
                return read(await self._http.call(session, "POST", "/generate", body), question)
            except AnswerError as error:
                nonsense.append(str(error))
            return read(await self._http.call(session, "POST", "/generate", body), question)

        answers = self._http.run(
            lambda session: self._http.gather([partial(ask, session, question) for question in questions], count),
            watched=False,  # `gather` watches, so that a hung server costs no answer that has come
        )
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
