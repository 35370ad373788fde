"""An HTTP server on loopback that behaves as SGLang does towards a sampler and a publisher, without a model.

Its answers depend on its state: tokens follow from the input, log-probs from the weights with which its KV cache was
computed. As in SGLang, the start of an input stays cached until the cache is flushed, even if the weights change.
"""

from __future__ import annotations

import base64
import hashlib
import pickle
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from aiohttp import web

from tests.http_server import serving

Body = dict[str, Any]
VOCABULARY = 50
FIRST_ID = 6
"""Ids below this one are end tokens or padding, which are not sampled."""
LONGEST = 500
PAGE = 3
"""Number of tokens at the start of an input that are its key in the cache."""


@dataclass
class FakeServer:
    """`requests` are all request bodies, in order, by path."""

    url: str = ""
    requests: list[tuple[str, Body]] = field(default_factory=list)
    label: str = "default"
    weights: dict[str, bytes] = field(default_factory=dict)
    cache: dict[tuple[int, ...], str] = field(default_factory=dict)
    """The weights that each start of an input was computed with."""
    in_update: bool = False
    paused: bool = False
    released: bool = False
    """Whether its memory is given back. As in SGLang, a wrong order ends the server: here the request fails."""
    die_after: int | None = None
    """Number of continuations until the connection breaks. None = never."""
    tokenize: Callable[[list[str]], Any] | None = None
    """The tokens that /tokenize returns. None = the server has no such path."""

    def bodies(self, path: str) -> list[Body]:
        """The requests to a path."""
        return [body for asked, body in self.requests if asked == path]

    def paths(self) -> list[str]:
        """All requests, in order."""
        return [path for path, _ in self.requests]

    def checksum(self) -> str:
        """Checksum of the current weights."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            digest.update(name.encode() + self.weights[name])
        return digest.hexdigest()

    def routes(self) -> dict[str, Callable[[Body], Any]]:
        """Answers by path."""
        return {
            "/generate": self._generate,
            "/server_info": lambda _: {"max_req_input_len": LONGEST, "tp_size": 1, "version": "0.5.23"},
            "/model_info": lambda _: {"weight_version": self.label},
            "/pause_generation": lambda _: self._set(paused=True),
            "/continue_generation": lambda _: self._set(paused=False),
            "/flush_cache": lambda _: self.cache.clear(),
            "/begin_weight_update": lambda _: self._set(in_update=True),
            "/end_weight_update": lambda _: self._set(in_update=False),
            "/update_weights_from_tensor": self._update,
            "/update_weight_version": lambda body: self._set(label=body["new_version"]),
            "/weights_checker": self._check,
            "/release_memory_occupation": lambda _: self._move_memory(back=True),
            "/resume_memory_occupation": lambda _: self._move_memory(back=False),
        } | ({"/tokenize": self._tokenize} if self.tokenize is not None else {})

    def _tokenize(self, body: Body) -> Body:
        assert self.tokenize is not None and body["add_special_tokens"] is False
        return {"tokens": self.tokenize(body["prompt"]), "count": 0, "max_model_len": LONGEST}

    def _set(self, **values: Any) -> None:
        vars(self).update(values)

    def _move_memory(self, *, back: bool) -> None:
        assert self.released is not back
        self.released = back
        if back:
            assert self.paused and not self.cache and not self.in_update, "the engine is not idle"
            self.weights = dict.fromkeys(self.weights, b"lost")

    def _generate(self, body: Body) -> Body:
        assert not self.paused and not self.in_update and not self.released
        if self.die_after is not None:
            self.die_after -= 1
            if self.die_after < 0:
                raise ConnectionAbortedError
        ids = tuple(body["input_ids"])
        used = self.cache.setdefault(ids[:PAGE], self.checksum())
        count = body["sampling_params"]["max_new_tokens"]
        output = [FIRST_ID + (sum(ids) + 7 * index) % (VOCABULARY - FIRST_ID) for index in range(count)]
        logp = logp_of(used)
        meta = {
            "finish_reason": {"type": "length"},
            "output_token_logprobs": [[logp, token, None] for token in output],
            "weight_version": self.label,
            "weight_versions": [{"version": self.label}],
        }
        return {"output_ids": output, "meta_info": meta}

    def _update(self, body: Body) -> None:
        assert self.in_update and self.paused and not self.released
        for name, tensor in pickle.loads(base64.b64decode(body["serialized_named_tensors"][0])):
            self.weights[name] = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        self.label = body["weight_version"]
        if body["flush_cache"]:
            self.cache.clear()

    def _check(self, body: Body) -> Body:
        if body["action"] == "reset_tensors":
            self.weights = dict.fromkeys(self.weights, b"random")
        return {"per_engine_checksum": self.checksum()}


def logp_of(checksum: str) -> float:
    """The log-prob of every token under weights with this checksum."""
    return -0.1 - int(checksum[:4], 16) / 65536.0


@contextmanager
def fake_server(tokenize: Callable[[list[str]], Any] | None = None) -> Iterator[FakeServer]:
    """A running server, in its own thread."""
    fake = FakeServer(tokenize=tokenize)

    def handler(path: str, answer: Callable[[Body], Any]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            body = await request.json() if request.can_read_body else {}
            if request.method == "POST":
                fake.requests.append((path, body))
            try:
                return web.json_response(answer(body))
            except ConnectionAbortedError:
                assert request.transport is not None
                request.transport.abort()
                raise

        return handle

    def app() -> web.Application:
        made = web.Application(client_max_size=2**24)
        for path, answer in fake.routes().items():
            made.router.add_route("*", path, handler(path, answer))
        return made

    with serving(app) as fake.url:
        yield fake
