"""Edges of serving: health, calls that change weights, the environment of a server, the width of a model folder."""

from __future__ import annotations

import base64
import json
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.glue.fake_server import fake_server
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import ModelError, ServerDied, ServerError
from tropd_mcore.serving import transport as transport_module
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.weight_payload import by_value
from tropd_mcore.serving.wire import WeightChecksums, read_server_info
from tropd_mcore.weights.served import read_vocab_size

Answer = tuple[int, Any]
"""(HTTP status, JSON)."""


class Scripted:
    """A server that gives the `answers` of a path in turn, then repeats the last, else 200. Records all requests."""

    def __init__(self, answers: dict[str, list[Answer]]) -> None:
        self.answers = answers
        self.url = ""
        self.asked: list[tuple[str, str, bytes]] = []

    def paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        self.asked.append((method, path, body))
        answers = self.answers.get(path, [(200, {})])
        return answers.pop(0) if len(answers) > 1 else answers[0]


@contextmanager
def scripted(**answers: list[Answer]) -> Iterator[Scripted]:
    """A running server."""
    script = Scripted({f"/{name}": given for name, given in answers.items()})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = script.answer(self.command, self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        script.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join()


def client_of(url: str, *, max_retries: int = 2) -> SglangClient:
    return SglangClient(url, ServerConfig(url=url, max_retries=max_retries), key="rollout.server")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "FIRST_WAIT_S", 0.01)


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (202, False), (404, False), (500, False), (503, False)])
def test_only_a_health_status_of_200_means_healthy_and_it_is_requested_once(status: int, healthy: bool) -> None:
    with scripted(health=[(status, {})]) as server:
        assert client_of(server.url).healthy() is healthy
    assert server.asked == [("GET", "/health", b"")]


def test_a_server_that_is_not_running_is_not_healthy() -> None:
    with scripted() as server:
        pass
    assert client_of(server.url).healthy() is False


def test_an_update_sends_the_tensors_to_the_server_under_the_given_label() -> None:
    weight = torch.arange(6.0).view(2, 3)
    with fake_server() as server:
        client = client_of(server.url)
        client.pause()
        client.begin_weight_update()
        client.update_weights(by_value([("a", weight)], copies=1), version="v1:incomplete")
        client.end_weight_update()
        client.resume()
        assert server.weights == {"a": weight.numpy().tobytes()} and server.label == "v1:incomplete"


def test_every_rank_of_the_server_gets_its_payload() -> None:
    payloads = [pickle.dumps(rank) for rank in range(3)]
    with scripted() as server:
        client_of(server.url).update_weights(payloads, version='of "today"')
    ((method, path, body),) = server.asked
    assert (method, path) == ("POST", "/update_weights_from_tensor")
    content = json.loads(body)
    assert [base64.b64decode(text) for text in content["serialized_named_tensors"]] == payloads
    assert content["weight_version"] == 'of "today"' and content["flush_cache"] is False


@pytest.mark.parametrize("call", ["begin_weight_update", "end_weight_update", "update_weights"])
def test_a_call_that_would_change_weights_twice_is_never_repeated(call: str) -> None:
    path = "update_weights_from_tensor" if call == "update_weights" else call
    with scripted(**{path: [(500, {"error": "boom"})]}) as server:
        client = client_of(server.url)
        with pytest.raises(ServerError, match=rf"/{path} answered 500: boom \(1 attempts"):
            client.update_weights([b"x"], version="v") if call == "update_weights" else getattr(client, call)()
    assert server.paths() == [f"/{path}"] and client.retries == 0


def test_a_session_that_an_earlier_update_left_open_is_closed_first(caplog: pytest.LogCaptureFixture) -> None:
    refusal = (400, {"error": {"message": "a session is already open"}})
    with scripted(begin_weight_update=[refusal, (200, {})]) as server:
        client_of(server.url).begin_weight_update()
    assert server.paths() == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]
    assert "closing the weight-update session that an earlier update left open" in caplog.text


def test_any_other_refusal_to_open_a_session_is_an_error() -> None:
    with (
        scripted(begin_weight_update=[(400, {"error": {"message": "not now"}})]) as server,
        pytest.raises(ServerError, match="rollout.server: /begin_weight_update answered 400: not now"),
    ):
        client_of(server.url).begin_weight_update()
    assert server.paths() == ["/begin_weight_update"]


@pytest.mark.parametrize("answer", [[], {}, {"per_engine_checksum": 7}])
def test_an_answer_without_a_checksum_is_an_error(answer: Any) -> None:
    with (
        scripted(weights_checker=[(200, answer)]) as server,
        pytest.raises(ServerError, match="/weights_checker answered no per_engine_checksum"),
    ):
        client_of(server.url).weights_checksum()
    with scripted(weights_checker=[(200, {"per_engine_checksum": "abc"})]) as server:
        assert client_of(server.url).weights_checksum() == WeightChecksums("abc", {})


def test_the_checksums_of_a_tensor_come_from_every_rank_that_has_it() -> None:
    ranks = [{"checksums": {"a": "1", "b": "2"}}, {"checksums": {"a": "3"}}, {"checksums": None}, None]
    with scripted(weights_checker=[(200, {"per_engine_checksum": "abc", "ranks": ranks})]) as server:
        found = client_of(server.url).weights_checksum()
    assert found is not None and found.tensors == {"a": ("1", "3"), "b": ("2",)}


@pytest.mark.parametrize(("said", "dtype"), [("float", "float32"), ("half", "float16"), ("bfloat16", "bfloat16")])
def test_the_served_model_is_read_from_both_info_pages(said: str, dtype: str) -> None:
    page = {"max_req_input_len": 99, "tp_size": 2, "version": "0.5.23", "dtype": said, "quantization": "fp8"}
    model = {"weight_version": "v1", "model_path": "hub/model", "model_type": "qwen3"}
    info = read_server_info(page, model)
    assert (info.model_path, info.model_type, info.dtype, info.quantization) == ("hub/model", "qwen3", dtype, "fp8")
    assert (info.weight_version, info.tensor_parallel, info.longest_input) == ("v1", 2, 98)
    assert info.cache_tokens is None and not info.float32_logits
    more = read_server_info({**page, "max_total_num_tokens": 77, "enable_fp32_lm_head": True}, model)
    assert more.cache_tokens == 77 and more.float32_logits
    assert read_server_info({**page, "max_total_num_tokens": "77"}, model).cache_tokens is None
    bare = read_server_info({"max_req_input_len": 99, "tp_size": 2}, {"weight_version": "v1"})
    assert (bare.model_path, bare.model_type, bare.dtype, bare.quantization) == ("?", "?", "?", None)


def test_a_server_without_checksums_gives_none_and_no_error() -> None:
    with scripted(weights_checker=[(404, {})]) as server:
        assert client_of(server.url).weights_checksum() is None


@pytest.mark.parametrize("status", [400, 401, 403, 405])
def test_a_refused_checksum_is_an_error_if_the_server_takes_weights_and_otherwise_one_warning(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with scripted(weights_checker=[(status, {"error": "admin only"})]) as server:
        with pytest.raises(ServerError, match=f"answered {status}"):
            client_of(server.url).weights_checksum()
        client = client_of(server.url)
        assert [client.weights_checksum(may_refuse=True) for _ in range(3)] == [None] * 3
    (line,) = caplog.messages
    assert f"answered {status}" in line and "set rollout.server.api_key_env to the variable" in line


def test_an_endpoint_that_the_server_lacks_gives_an_error_with_the_required_version() -> None:
    with (
        scripted(flush_cache=[(404, {})]) as server,
        pytest.raises(ServerError, match=r"has no /flush_cache: expected SGLang 0\.5\.23 or newer"),
    ):
        client_of(server.url).flush_cache()


def test_a_dead_server_is_distinguished_from_one_that_refuses() -> None:
    with scripted(flush_cache=[(500, {})]) as server, pytest.raises(ServerError) as refused:
        client_of(server.url, max_retries=0).flush_cache()
    assert not isinstance(refused.value, ServerDied)
    with pytest.raises(ServerDied, match="rollout.server: no connection to"):
        client_of(server.url, max_retries=0).flush_cache()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{}", "None"),
        ('{"vocab_size": null}', "None"),
        ('{"vocab_size": "307"}', "'307'"),
        ('{"vocab_size": 307.0}', "307.0"),
        ('{"vocab_size": true}', "True"),
        ('{"vocab_size": 307, "text_config": {"vocab_size": 0}}', "0"),
    ],
)
def test_a_model_config_without_an_integer_width_is_refused(tmp_path: Path, content: str, found: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        ModelError, match=rf"config.json: vocab_size is {found}; expected a positive integer, the number"
    ):
        read_vocab_size(tmp_path)


def test_the_vocabulary_width_of_a_model_is_read_from_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 307, "hidden_size": 8}')
    assert read_vocab_size(tmp_path) == 307
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json: not valid JSON"):
        read_vocab_size(tmp_path)
