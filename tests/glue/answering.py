"""Answers in this process to the requests that a command sends to its server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tropd_mcore.cli.server as server_module
from tests.tiny_models import tiny_tokenizer
from tropd_mcore.serving.wire import Generation, GenerationRequest


class Client:
    """Answers every request with two tokens and the first of its end tokens."""

    key, url = "teacher.server", "http://127.0.0.1:1"

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []

    def info(self) -> SimpleNamespace:
        return SimpleNamespace(longest_sequence=10_000)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [tiny_tokenizer().encode(text, add_special_tokens=False) for text in texts]

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        self.requests += requests
        ids = [np.array([70, 70, request.stop_token_ids[-1]], np.int32) for request in requests]
        return [Generation(each, np.zeros(3, np.float32), "stop", ("default",)) for each in ids]


def answered_by(client: Client, monkeypatch: pytest.MonkeyPatch, opened: list[str] | None = None) -> Client:
    """Let `client` answer for all servers that a command opens; `opened` gets the keys of their models."""

    class Servers:
        """A fleet of one server, which is its own first and only one."""

        def __init__(self, *_: Any, key: str, model_key: str, **__: Any) -> None:
            if opened is not None:
                opened.append(model_key)
            self.client, self.spec, self.is_started = client, SimpleNamespace(key=key), True
            self.is_kept_elsewhere = False
            self.generate = client.generate
            self.first, self.each = self, (self,)

        def infos(self) -> list[tuple[Any, SimpleNamespace]]:
            return [(self, client.info())]

        def __enter__(self) -> Servers:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    monkeypatch.setattr(server_module, "open_servers", Servers)
    return client
