"""A synchronous client of one SGLang server: sampling, scoring and weight updates.

This module does not start servers (see `process`), does not retry or detect hangs (see `transport`), and does not
decide what happens when a server is gone (see `supervisor`). Invariant: every answer is checked (see `wire`). If it
makes no sense, the request is sent once more; a second bad answer is an AnswerError. Each call runs its own event loop,
so the client cannot be used inside a running one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import aiohttp

from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import ServerDied, ServerError
from tropd_mcore.progress import progress
from tropd_mcore.serving import wire
from tropd_mcore.serving.dispatch import dispatch
from tropd_mcore.serving.environment import read_api_key
from tropd_mcore.serving.transport import Endpoint, MissingError, RefusedError, Transport
from tropd_mcore.serving.work import Dispatched, Lane, Work

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Question = TypeVar("Question")

HEALTH_TIMEOUT_S = 30.0
LEAVE_S = 10.0
"""Time-out of the request to leave a group, which nothing waits for."""
IDLE_S = 30.0
"""Longest time in seconds that the engine may need to finish what it runs after the last answer."""


class SglangClient:
    """Talks to the server at `url`. `key` is the configuration section of the server, for messages (`rollout.server`).

    `name` is the prefix of log lines and errors; the default is `key`. Three arguments are for a server that we
    started: `alive` returns whether its process runs (if not, nothing is retried), `stopped` returns which of its
    processes is stopped, and `api_key` is the key that it was given. For a server that runs elsewhere, the
    configuration's `api_key_env` names the variable with the key. `beside` is for a router (see `router_lane`).
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
        beside: Callable[[], Coroutine[None, None, ServerDied]] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.key = key
        self.name = name or key
        self.asked_again = 0
        """Number of answers that made no sense, so that the request was sent once more; over the client's life."""
        self.same_host = alive is not None
        """Whether the server shares this host's memory. True for servers that we started."""
        self._told_refusal = False
        if api_key is None and config.url:
            api_key = read_api_key(config.api_key_env, key=f"{key}.api_key_env")
        self._http = Transport(Endpoint(self.url, config, key, self.name, alive, stopped, api_key, beside))

    @property
    def retries(self) -> int:
        """Number of retries over the client's life."""
        return self._http.retries

    def healthy(self, timeout_s: float = HEALTH_TIMEOUT_S) -> bool:
        """Return whether the server can generate: False while it starts, is paused or does not answer.

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
        """Return the server's version label, tensor-parallel size and limits. Raises ServerError."""

        async def ask(session: aiohttp.ClientSession) -> wire.ServerInfo:
            server = await self._http.call(session, "GET", "/server_info")
            return wire.read_server_info(server, await self._http.call(session, "GET", "/model_info"))

        return self._http.run(ask)

    def generate(self, requests: list[wire.GenerationRequest]) -> list[wire.Generation | ServerError]:
        """Sample each request. Entry i is the continuation of request i, or the error that it failed with.

        At most `max_concurrency` requests are in flight. All token ids must be inside the vocabulary; any other id
        kills SGLang.
        """
        return generate_on([self], requests).answers

    def score(self, requests: list[wire.ScoringRequest]) -> list[wire.TokenScores | ServerError]:
        """Score each request at temperature 1. Entry i holds the scores of request i, or the error it failed with."""
        return score_on([self], requests).answers

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Tokenize each text on the server, without adding special tokens.

        Raises ServerError if the server has no /tokenize (older than SGLang 0.5.23) or its answer is malformed.
        """
        answer = self._post("/tokenize", {"prompt": list(texts), "add_special_tokens": False}, retry=False)
        return wire.read_token_lists(answer, len(texts))

    def pause(self) -> None:
        """Abort running requests and hold new ones back until `resume`."""
        self._post("/pause_generation", {"mode": "abort"})

    def resume(self, limit_s: float | None = None) -> None:
        """Accept requests again; harmless if the server is not paused. `limit_s` allows one attempt of that length."""
        self._post("/continue_generation", {}, retry=limit_s is None, limit_s=limit_s)

    def flush_cache(self) -> None:
        """Drop all cached keys and values. Raises ServerError while requests run."""
        self._post("/flush_cache", {}, json_answer=False)

    def release_memory(self) -> None:
        """Give back the memory of weights, KV cache and CUDA graphs. Requests wait until `resume_memory`.

        Only for a server that was started with --enable-memory-saver; any other keeps its memory. Its engine must be
        idle, or SGLang ends it, so requests are held back first. Raises ServerError.
        """
        self.pause()
        self._post(f"/flush_cache?timeout={IDLE_S:g}", {}, json_answer=False)  # waits until the engine is idle
        self._post("/release_memory_occupation", {}, retry=False, json_answer=False)

    def resume_memory(self) -> None:
        """Take the memory back and accept requests. The weights are undefined until the next update.

        SGLang ends if the memory was not released, or if too little is free. Raises ServerError.
        """
        self._post("/resume_memory_occupation", {}, retry=False, json_answer=False)
        self.resume()

    def begin_weight_update(self) -> None:
        """Open a weight-update session. If an earlier failure left one open, it is closed first."""
        try:
            self._post("/begin_weight_update", {}, retry=False)
        except ServerError as error:
            if "already open" not in str(error):
                raise
            log.warning("%s: closing the weight-update session that an earlier update left open", self.key)
            self._post("/end_weight_update", {}, retry=False)
            self._post("/begin_weight_update", {}, retry=False)

    def update_weights(self, payloads: list[bytes], *, version: str) -> None:
        """Load one payload per rank (see `weight_payload`) and label the server's weights `version`. Never retried.

        The server ignores unknown names, and a wrong shape kills it. Check both first (see `rollout.publisher`). Raises
        ServerError if the server refuses.
        """
        self._post("/update_weights_from_tensor", wire.weights_body(payloads, version=version), retry=False)

    def update_weights_from_disk(self, folder: Path, *, version: str) -> None:
        """Load the Hugging Face folder and label the server's weights `version`. Never retried.

        The server must see the folder under this path. No weight-update session may be open. Raises ServerError.
        """
        body: wire.Json = {
            "model_path": str(folder),
            "load_format": "auto",
            "weight_version": version,
            "flush_cache": False,
        }
        self._post("/update_weights_from_disk", body, retry=False)

    def join_weight_group(
        self, *, address: str, port: int, rank: int, world_size: int, name: str, backend: str, limit_s: float
    ) -> None:
        """Let the server's ranks join a process group as ranks `rank` and up, whose store is at `address`.

        Never retried.

        With gloo, it returns when all ranks have joined, so rank 0 has to join meanwhile. Raises ServerError.
        """
        body: wire.Json = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank,
            "world_size": world_size,
            "group_name": name,
            "backend": backend,
        }
        self._post("/init_weights_update_group", body, retry=False, limit_s=limit_s)

    def update_weights_from_group(
        self, tensors: list[tuple[str, torch.dtype, tuple[int, ...]]], *, group: str, version: str, limit_s: float
    ) -> None:
        """Load the tensors of one broadcast of rank 0 of `group`, one after the other in its bytes. Never retried.

        Otherwise like `update_weights`.
        """
        body: wire.Json = {
            "names": [name for name, _, _ in tensors],
            "dtypes": [str(dtype).removeprefix("torch.") for _, dtype, _ in tensors],
            "shapes": [list(shape) for _, _, shape in tensors],
            "group_name": group,
            "load_format": "flattened_bucket",
            "weight_version": version,
            "flush_cache": False,
        }
        self._post("/update_weights_from_distributed", body, retry=False, limit_s=limit_s)

    def leave_weight_group(self, name: str) -> None:
        """Let the server's ranks leave a group. Raises ServerError."""
        self._post("/destroy_weights_update_group", {"group_name": name}, retry=False, limit_s=LEAVE_S)

    def end_weight_update(self, limit_s: float | None = None) -> None:
        """Close the weight-update session within `limit_s` (default: request_timeout_s)."""
        self._post("/end_weight_update", {}, retry=False, limit_s=limit_s)

    def label_weights(self, version: str) -> None:
        """Label the server's current weights `version`. The server returns this label with every sample."""
        self._post("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def weights_checksum(self, *, may_refuse: bool = False) -> wire.WeightChecksums | None:
        """Return checksums of all weights on all ranks, or None if the server has no /weights_checker.

        Equal weights give equal checksums on servers with the same parallel layout. Cost: SGLang reads every weight
        once (SHA-256 on a CPU, about 1 GiB/s; a kernel at memory speed on a GPU). Raises ServerError. With
        `may_refuse`, a refusal also gives None and one warning (SGLang asks for its admin key here if it has one). Use
        it for a server that does not receive weights from us.
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
                    "%s: the server refuses to give checksums of its weights, so only its scores show which model it "
                    "serves (%s). If it has an admin key, set %s.api_key_env to the variable that holds it",
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
        """Overwrite all server weights with random numbers, to prove that the next update sets every one of them."""
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

    def lane(self, speed: float = 1.0) -> Lane:
        """Return this server for `dispatch`."""
        return Lane(self._http, speed)

    def note_nonsense(self, nonsense: Sequence[str], asked: int) -> None:
        """Count the answers that made no sense, of `asked` questions, with one log line for all of them."""
        self.asked_again += len(nonsense)
        log.warning(
            "%s: %d of %d answers made no sense and were asked for once more; the first: %s", self.key, len(nonsense),
            asked, nonsense[0],
        )  # fmt: skip


def generate_on(
    clients: Sequence[SglangClient],
    requests: Sequence[wire.GenerationRequest],
    *,
    speeds: Sequence[float] = (),
    refuses: Callable[[wire.Generation], str | None] = lambda _: None,
) -> Dispatched[wire.Generation]:
    """Sample each request on one of the servers (see `dispatch`).

    `speeds` are those of the servers; empty = equal. `refuses` says why an answer shows that its server must not be
    used.
    """
    work = Work(
        body=wire.generation_body,
        read=wire.read_generation,
        tokens=lambda answer: len(answer.output_ids),
        size=lambda request: (request.max_new_tokens, len(request.input_ids)),
        group=lambda request: request.input_ids.tobytes(),
        is_part=lambda answer: answer.finish_reason == "abort",
        after=wire.continued,
        joined=wire.joined,
        refuses=refuses,
    )
    with progress(log, _called(clients), total=len(requests), unit="responses", amount_unit="tok") as state:
        longest = 0

        def count(answer: wire.Generation | ServerError) -> None:
            nonlocal longest
            tokens = 0 if isinstance(answer, ServerError) else len(answer.output_ids)
            longest = max(longest, tokens)
            state.advance(note=f"longest {longest}", amount=tokens)

        return _dispatched(clients, speeds, work, requests, count)


def score_on(
    clients: Sequence[SglangClient], requests: Sequence[wire.ScoringRequest], *, speeds: Sequence[float] = ()
) -> Dispatched[wire.TokenScores]:
    """Score each request on one of the servers at temperature 1 (see `dispatch`)."""
    work: Work[wire.ScoringRequest, wire.TokenScores] = Work(
        body=wire.scoring_body,
        read=wire.read_scores,
        tokens=lambda answer: len(answer.logp_N),
        size=lambda request: (len(request.token_ids),),
    )
    with progress(log, _called(clients), total=len(requests), unit="samples scored", amount_unit="tok") as state:

        def count(answer: wire.TokenScores | ServerError) -> None:
            state.advance(amount=0 if isinstance(answer, ServerError) else len(answer.logp_N))

        return _dispatched(clients, speeds, work, requests, count)


def _called(clients: Sequence[SglangClient]) -> str:
    """The prefix of progress lines."""
    if len(clients) == 1:
        return clients[0].name
    return f"{len(clients)} servers ({clients[0].key} and others)"


def _dispatched(
    clients: Sequence[SglangClient],
    speeds: Sequence[float],
    work: Work[Question, Answer],
    questions: Sequence[Question],
    count: Callable[[Answer | ServerError], None],
) -> Dispatched[Answer]:
    lanes = [client.lane(speed) for client, speed in zip(clients, speeds or [1.0] * len(clients), strict=True)]
    found = dispatch(lanes, work, questions, count)
    for place, nonsense in found.nonsense.items():
        clients[place].note_nonsense(nonsense, len(questions))
    return found
