"""Faults on the wire that a healthy server does not show: a small HTTP server with scripted answers."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from tests.http_server import serving
from tropd_mcore.config.schema import RolloutConfig, ServerConfig
from tropd_mcore.errors import ServerDied, ServerError
from tropd_mcore.progress import Progress
from tropd_mcore.rollout.prefixes import ResponseSampling, generate_responses
from tropd_mcore.rollout.sampler import SglangSampler
from tropd_mcore.serving import transport as transport_module
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.fleet import ServerFleet
from tropd_mcore.serving.wire import GenerationRequest, ScoringRequest
from tropd_mcore.teacher.sglang import SglangTeacher
from tropd_mcore.types import Prompt, Rollout, SampleRequest

Answer = web.Response | dict[str, object]
SECRET = "sk-not-in-any-log"


@dataclass
class Scripted:
    """Answers /generate with `answers` in turn, then repeats the last one."""

    answers: list[Answer]
    url: str = ""
    bodies: list[dict[str, object]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    delay_s: float = 0.0
    together: int = 1
    """Answers are held back until this many requests have been in flight at once."""
    released: bool = False
    """No answer is held back any more."""

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        self.in_flight += 1
        self.most_in_flight = max(self.in_flight, self.most_in_flight)
        while self.most_in_flight < self.together and not self.released:
            await asyncio.sleep(0.005)
        await asyncio.sleep(self.delay_s)
        self.in_flight -= 1
        answer = self.answers[min(len(self.bodies), len(self.answers)) - 1]
        if not isinstance(answer, web.Response):
            return web.json_response(answer)
        return web.Response(status=answer.status, body=answer.body, content_type="application/json")

    async def info(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"max_req_input_len": 506, "tp_size": 1, "version": "0.5.23", "weight_version": "v1"})


@pytest.fixture
def serve() -> Iterator[Callable[..., Scripted]]:
    with ExitStack() as stack:

        def start(*answers: Answer, **behaviour: Any) -> Scripted:
            scripted = Scripted(list(answers), **behaviour)

            def app() -> web.Application:
                made = web.Application()
                made.router.add_post("/generate", scripted.generate)
                made.router.add_get("/server_info", scripted.info)
                made.router.add_get("/model_info", scripted.info)
                return made

            scripted.url = stack.enter_context(serving(app))
            stack.callback(setattr, scripted, "released", True)  # before the server stops, so that nothing is held back
            return scripted

        yield start


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "FIRST_WAIT_S", 0.01)


def generation(ids: list[int], *, reason: str = "length", versions: tuple[str, ...] = ("v1",)) -> dict[str, object]:
    return {
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": reason},
            "output_token_logprobs": [[-0.5, token_id, None] for token_id in ids],
            "weight_version": versions[-1],
            "weight_versions": [{"version": version} for version in versions],
        },
    }


def broken(meta: dict[str, object]) -> dict[str, object]:
    answer = generation([7, 8])
    answer["meta_info"] = {**answer["meta_info"], **meta}  # type: ignore[dict-item]
    return answer


def make_client(url: str, **config: object) -> SglangClient:
    settings = ServerConfig(url=url, max_retries=2, **config)  # type: ignore[arg-type]
    return SglangClient(url, settings, key="rollout.server")


ASK = GenerationRequest(np.array([3, 4], np.int32), max_new_tokens=2, vocab_size=50)


def one(client: SglangClient) -> object:
    (answer,) = client.generate([ASK])
    return answer


def test_a_503_is_retried_and_a_400_is_not(serve: Callable[..., Scripted]) -> None:
    server = serve(web.Response(status=503), web.Response(status=503), generation([7, 8]))
    client = make_client(server.url)
    assert one(client).output_ids.tolist() == [7, 8]  # type: ignore[attr-defined]
    assert len(server.bodies) == 3 and client.retries == 2

    server = serve(web.Response(status=400, body=b'{"error": {"message": "input_ids\\ncannot be empty."}}'))
    error = one(make_client(server.url))
    assert isinstance(error, ServerError) and not isinstance(error, ServerDied)
    assert str(error) == "rollout.server: /generate answered 400: input_ids cannot be empty."
    assert len(server.bodies) == 1


def test_retries_are_bounded_and_their_number_is_in_the_error(serve: Callable[..., Scripted]) -> None:
    server = serve(web.Response(status=500, body=b"boom"))
    error = one(make_client(server.url))
    assert str(error) == "rollout.server: /generate answered 500: boom (3 attempts; rollout.server.max_retries)"
    assert len(server.bodies) == 3


def test_truncated_json_is_retried_and_then_an_error(serve: Callable[..., Scripted]) -> None:
    whole = json.dumps(generation([7, 8])).encode()
    server = serve(web.Response(body=whole[:40]), generation([7, 8]))
    assert one(make_client(server.url)).output_ids.tolist() == [7, 8]  # type: ignore[attr-defined]
    server = serve(web.Response(body=whole[:40]))
    assert "JSON that cannot be read" in str(one(make_client(server.url)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (broken({"output_token_logprobs": [[-0.5, 7, None]]}), "1 output_token_logprobs for 2 tokens"),
        (broken({"output_token_logprobs": None}), "nothing as output_token_logprobs; expected a list"),
        (broken({"output_token_logprobs": [[-0.5, 7, None], [None, 8, None]]}), "log-prob None"),
        (broken({"output_token_logprobs": [[-0.5, 7, None], [-0.5, 9, None]]}), r"expected \[log-prob, 8"),
        (broken({"finish_reason": {"type": "tool"}}), "finish_reason 'tool'"),
        (generation([]), "no token in output_ids"),
        (web.Response(body=b'{"output_ids": [7, 8], "meta_info": {"finish_reason": null}}'), "finish_reason"),
        (web.Response(body=b'{"text": "x"}'), "answered nothing as meta_info; expected a JSON object"),
    ],
)
def test_an_incomplete_answer_is_an_error_and_never_filled_in(
    serve: Callable[..., Scripted], answer: Answer, message: str
) -> None:
    error = one(make_client(serve(answer).url))
    assert isinstance(error, ServerError)
    with pytest.raises(ServerError, match=message):
        raise error


def test_a_nan_log_prob_is_refused(serve: Callable[..., Scripted]) -> None:
    body = json.dumps(broken({"output_token_logprobs": [[-0.5, 7, None], [float("nan"), 8, None]]})).encode()
    assert "expected a finite number" in str(one(make_client(serve(web.Response(body=body)).url)))


def test_a_missing_or_wrongly_sized_top_k_is_an_error(serve: Callable[..., Scripted]) -> None:
    values = base64.b64encode(np.zeros((1, 2), "<f4").tobytes()).decode()
    meta: dict[str, object] = {
        "input_token_logprobs": [[None, 4, None], [-1.0, 5, None]],
        "input_top_logprobs_shape": [1, 2],
        "input_top_logprobs_null_prefix": 1,
        "input_top_logprobs_val_flat_b64": values,
        "input_top_logprobs_idx_flat_b64": values[:8],
    }
    ask = ScoringRequest(np.array([3, 4, 5], np.int32), first=2, topk=2, vocab_size=50)
    for change, message in (
        ({}, "6 bytes in input_top_logprobs_idx_flat_b64"),
        ({"input_top_logprobs_idx_flat_b64": "*"}, "not base64"),
        ({"input_top_logprobs_val_flat_b64": None}, "without meta_info.input_top_logprobs_val_flat_b64"),
        ({"input_top_logprobs_shape": [2, 2]}, r"shape \[2, 2\]"),
        ({"input_token_logprobs": [[-1.0, 5, None]]}, "0 input_token_logprobs for 1 tokens"),
    ):
        (error,) = make_client(serve({"meta_info": {**meta, **change}}).url).score([ask])
        assert isinstance(error, ServerError)
        with pytest.raises(ServerError, match=message):
            raise error


def test_a_dead_server_is_recognised_and_not_waited_for_once_its_process_has_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    client = make_client(url)
    assert isinstance(one(client), ServerDied) and client.retries == 2
    watched = SglangClient(url, ServerConfig(max_retries=2), key="rollout.server", alive=lambda: False)
    error = one(watched)
    assert isinstance(error, ServerDied) and "its process has ended" in str(error) and watched.retries == 0
    assert not client.healthy()


def test_no_more_requests_are_in_flight_than_allowed(
    serve: Callable[..., Scripted],
) -> None:
    server = serve(*(generation([7 + index % 2]) for index in range(20)), delay_s=0.02, together=3)
    client = make_client(server.url, max_concurrency=3)
    answers = client.generate([ASK] * 20)
    assert len(answers) == 20 and server.most_in_flight == 3


def test_the_api_key_is_sent_and_never_logged(
    serve: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    server = serve(web.Response(status=401), web.Response(status=503))
    client = make_client(server.url, api_key_env="MY_KEY")
    with caplog.at_level(logging.DEBUG):
        refused = one(client)
        failed = one(client)
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert "check the key that api_key_env names" in str(refused)
    assert SECRET not in caplog.text + str(refused) + str(failed) + repr(vars(failed))
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ServerError, match=r"rollout.server.api_key_env=MY_KEY: this environment variable is unset"):
        make_client(server.url, api_key_env="MY_KEY")


def sampler(url: str) -> SglangSampler:
    config = RolloutConfig(server=ServerConfig(url=url, max_retries=2))
    return SglangSampler([make_client(url)], config, eos_ids=(2,), vocab_size=50, seed=0, masked_share=0.25)


def sample_request(*, new: int = 2) -> SampleRequest:
    ids = np.array([3, 4], np.int32)
    return SampleRequest("s", "p", ids, ids[:0], new, carries_prefix_loss=False, answer=None)


@pytest.mark.parametrize("versions", [("v2",), ("v1", "v2"), ("v1:incomplete",)])
def test_tokens_of_an_unexpected_policy_version_are_refused(
    serve: Callable[..., Scripted], versions: tuple[str, ...]
) -> None:
    server = serve(generation([7, 8], versions=versions))
    with pytest.raises(ServerError, match=r"a sample was drawn from weights .*; expected 'v1' alone"):
        sampler(server.url).sample([sample_request()], step=0, expected_version="v1")


def test_an_aborted_sample_goes_on_from_its_tokens(serve: Callable[..., Scripted]) -> None:
    server = serve(generation([7], reason="abort"), generation([8, 9]))
    asking = sampler(server.url)
    (rollout,) = asking.sample([sample_request(new=3)], step=0, expected_version="v1")
    assert rollout.response_ids.tolist() == [7, 8, 9] and rollout.finish_reason == "length" and asking.aborted == 1
    first, second = (body for body in server.bodies if "input_ids" in body)
    assert second["input_ids"] == [*first["input_ids"], 7] and second["sampling_params"]["max_new_tokens"] == 2


def test_a_sample_that_is_always_aborted_ends_in_an_error(serve: Callable[..., Scripted]) -> None:
    nothing = generation([], reason="abort")
    with pytest.raises(ServerError, match="1 of 1 samples were still aborted after max_retries=2"):
        sampler(serve(nothing).url).sample([sample_request()], step=0, expected_version="v1")


@pytest.mark.parametrize(("last", "reason"), [(8, "length"), (2, "stop")])
def test_a_sample_that_had_ended_when_it_was_aborted_is_kept(
    serve: Callable[..., Scripted], last: int, reason: str
) -> None:
    """Drawn anew it might get another length."""
    server = serve(generation([7, last], reason="abort"))
    asking = sampler(server.url)
    (rollout,) = asking.sample([sample_request()], step=0, expected_version="v1")
    assert rollout.response_ids.tolist() == [7, last] and rollout.finish_reason == reason and asking.aborted == 0


def test_a_response_truncated_by_the_server_is_refused(serve: Callable[..., Scripted]) -> None:
    with pytest.raises(ServerError, match=r"answered 2 tokens that ended by 'length'; expected 5 \(max_new_tokens\)"):
        sampler(serve(generation([7, 8])).url).sample([sample_request(new=5)], step=0, expected_version="v1")


def fleet_at(url: str) -> ServerFleet:
    """A fleet of one server at a url."""
    server: Any = Restarting(url, url, restarts=0)
    return ServerFleet([server])


def test_teacher_responses_survive_an_interruption(serve: Callable[..., Scripted], tmp_path: Path) -> None:
    prompts = [Prompt(f"p{i}", np.array([3 + i], np.int32), None, None) for i in range(3)]
    sampling = ResponseSampling(
        max_new_tokens=2, temperature=1.0, top_p=1.0, eos_ids=(2,), vocab_size=50, served_width=50
    )
    out = tmp_path / "out" / "responses.jsonl"
    server = serve(generation([7, 8]), web.Response(status=400, body=b"no"))
    with pytest.raises(ServerError, match="answered 400"):
        generate_responses(fleet_at(server.url), prompts, out, sampling, chunk=1)
    assert not out.exists()
    server = serve(generation([9, 2], reason="stop"))
    report = generate_responses(fleet_at(server.url), prompts, out, sampling, chunk=1)
    assert (report.sampled, report.finished) == (2, 2)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["response_ids"] for line in lines] == [[7, 8], [9], [9]]
    assert [line["finished"] for line in lines] == [False, True, True]


def test_a_teacher_response_is_cut_before_an_id_that_is_not_a_token(
    serve: Callable[..., Scripted], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [Prompt("p", np.array([3], np.int32), None, None)]
    sampling = ResponseSampling(
        max_new_tokens=4, temperature=1.0, top_p=1.0, eos_ids=(2,), vocab_size=50, served_width=64
    )
    out = tmp_path / "responses.jsonl"
    report = generate_responses(fleet_at(serve(generation([7, 60, 8, 2], reason="stop")).url), prompts, out, sampling)
    assert report.finished == 0
    assert json.loads(out.read_text()) == {"id": "p", "response_ids": [7], "finished": False}
    assert "cut before id 60" in caplog.text


class Restarting:
    """A supervised server that is gone until it is recovered, at most `restarts` times."""

    is_kept_elsewhere = False

    def __init__(self, gone: str, alive: str, *, restarts: int) -> None:
        config = ServerConfig(max_retries=0)
        self.client = SglangClient(gone, config, key="teacher.server")
        self.spec = SimpleNamespace(key="teacher.server")
        self._after = SglangClient(alive, config, key="teacher.server")
        self._restarts = restarts

    def recover(self, error: ServerDied) -> None:
        if not self._restarts:
            raise error
        self._restarts -= 1
        self.client = self._after


def test_a_teacher_that_died_is_restarted_and_its_requests_repeated(serve: Callable[..., Scripted]) -> None:
    top = base64.b64encode(np.log(np.array([[0.25, 0.5]], "<f4")).tobytes()).decode()
    ids = base64.b64encode(np.array([[9, 4]], "<i4").tobytes()).decode()
    meta = {
        "input_token_logprobs": [[None, 4, None], [-1.5, 5, None]],
        "input_top_logprobs_shape": [1, 2],
        "input_top_logprobs_null_prefix": 1,
        "input_top_logprobs_val_flat_b64": top,
        "input_top_logprobs_idx_flat_b64": ids,
    }
    with socket.create_server(("127.0.0.1", 0)) as closed:
        gone = f"http://127.0.0.1:{closed.getsockname()[1]}"
    alive = serve({"meta_info": meta}).url
    one_token = np.array([5], np.int32)
    prompt, nothing = np.array([3, 4], np.int32), np.zeros(1, np.float32)
    rollout = Rollout("s", "p", prompt, prompt[:0], one_token, nothing, nothing, "v", "stop", False, None)
    settings = {"topk": 2, "teacher_width": 10, "student_width": 10, "on_failure": "mask"}
    teacher = SglangTeacher(Restarting(gone, alive, restarts=1), **settings)  # type: ignore[arg-type]
    (score,) = teacher.fetch([rollout]).samples
    assert score is not None and score.first == 2
    assert score.topk_ids_NK.tolist() == [[4, 9]]
    np.testing.assert_allclose(score.tail_mass_N, [0.25], atol=1e-6)
    with pytest.raises(ServerDied):
        SglangTeacher(Restarting(gone, alive, restarts=0), **settings).fetch([rollout])  # type: ignore[arg-type]


def test_rollouts_are_counted_as_they_arrive(serve: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    """Completed of all, tokens, and the longest, for answers that have arrived while others are awaited."""
    lines: list[str] = []
    advance = Progress.advance

    def note(state: Progress, *given: Any, **named: Any) -> None:
        advance(state, *given, **named)
        lines.append(state.line(state.begun + 10.0))

    monkeypatch.setattr(Progress, "advance", note)
    server = serve(generation([7, 8, 9]), web.Response(status=400), generation([7, 8]), generation([7]))
    answers = make_client(server.url, max_concurrency=1).generate(
        [replace(ASK, max_new_tokens=count) for count in (3, 2, 2, 1)]
    )
    assert [isinstance(answer, ServerError) for answer in answers] == [False, True, False, False]
    assert lines == [
        "rollout.server: 1 of 4 responses, 0.3 tok/s, longest 3, 30 s left",
        "rollout.server: 2 of 4 responses, 0.3 tok/s, longest 3, 10 s left",
        "rollout.server: 3 of 4 responses, 0.5 tok/s, longest 3, 3 s left",
        "rollout.server: 4 of 4 responses, 0.6 tok/s, longest 3, 0 s left",
    ]
