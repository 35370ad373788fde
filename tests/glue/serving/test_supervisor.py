"""Restarts of a started server are bounded, and the new process is checked before it gets requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.glue.fake_server import fake_server
from tests.glue.test_serving_edges import scripted
from tropd_mcore import stopping
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import GateError, ServerDied, ServerError, ServerHung, StopRequested
from tropd_mcore.serving import process as process_module
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.serving.wire import read_server_info


def supervised(tmp_path: Path, events: list[str], *, max_restarts: int = 2) -> SupervisedServer:
    """A server whose process only records its calls."""
    server = SupervisedServer(
        ServerSpec(
            key="teacher.server",
            model_key="teacher.path",
            model_path=tmp_path,
            config=ServerConfig(max_restarts=max_restarts),
            device="cpu",
            run_dir=tmp_path,
            name="teacher",
        )
    )
    process: Any = SimpleNamespace(
        stop=lambda: None,
        start=lambda: events.append("restart"),
        wait_ready=lambda: None,
        describe_end=lambda: "it ended",
    )
    server._process = process
    return server


@pytest.mark.parametrize("fails", ["start", "wait_ready"])
@pytest.mark.parametrize("error", [ServerError("no"), KeyboardInterrupt()])
def test_a_server_that_does_not_become_ready_is_stopped(tmp_path: Path, fails: str, error: BaseException) -> None:
    events: list[str] = []
    server = supervised(tmp_path, events)

    def fail() -> None:
        raise error

    steps: dict[str, Any] = {name: lambda name=name: events.append(name) for name in ("start", "wait_ready", "stop")}
    server._process = SimpleNamespace(client=lambda: None, **{**steps, fails: fail})  # type: ignore[assignment]
    with pytest.raises(type(error)), server:
        raise AssertionError("the block is not entered")
    assert events[-1] == "stop"


def test_a_start_that_fails_half_way_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def fail(place: Any, _extra: object) -> None:
        made.append(place.folder)
        assert place.folder.is_dir()
        raise ServerError("no")

    monkeypatch.setattr(process_module, "server_environment", fail)
    (tmp_path / "config.json").write_text("{}")
    server = SupervisedServer(supervised(tmp_path, []).spec)
    with pytest.raises(ServerError, match="no"), server:
        raise AssertionError("the block is not entered")
    assert len(made) == 1 and not made[0].exists()


def test_the_new_process_is_checked_after_every_restart(tmp_path: Path) -> None:
    events: list[str] = []
    server = supervised(tmp_path, events)
    server.recover(ServerDied("gone"))
    server.after_restart = lambda: events.append("looked at")
    server.recover(ServerDied("gone"))
    assert events == ["restart", "restart", "looked at"] and server.restarts == 2


def test_a_process_that_dies_during_its_check_is_restarted_as_often_as_allowed(tmp_path: Path) -> None:
    events: list[str] = []
    server = supervised(tmp_path, events, max_restarts=3)

    def look() -> None:
        events.append("looked at")
        raise ServerDied("gone again")

    server.after_restart = look
    with pytest.raises(ServerDied, match="max_restarts=3 are used up"):
        server.recover(ServerDied("gone"))
    assert events == ["restart", "looked at"] * 3


def test_an_error_found_by_the_check_of_a_new_process_reaches_the_caller(tmp_path: Path) -> None:
    server = supervised(tmp_path, [])

    def look() -> None:
        raise GateError("another model")

    server.after_restart = look
    with pytest.raises(GateError, match="another model"):
        server.recover(ServerDied("gone"))


def test_for_a_hung_server_the_error_is_shown_instead_of_that_its_process_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = supervised(tmp_path, [], max_restarts=1)
    server.recover(ServerHung("hung: no answer for 60 s"))
    assert "hung: no answer for 60 s; restart 1 of 1" in caplog.text and "it ended" not in caplog.text


@pytest.fixture
def asked_to_stop() -> Iterator[None]:
    stopping.request("SIGTERM")
    yield
    stopping.forget()


@pytest.mark.usefixtures("asked_to_stop")
def test_a_server_that_dies_of_the_signal_that_stops_the_run_is_not_restarted(tmp_path: Path) -> None:
    events: list[str] = []
    server = supervised(tmp_path, events)
    with pytest.raises(StopRequested, match="SIGTERM"):
        server.recover(ServerDied("gone"))
    with stopping.held(), pytest.raises(ServerDied, match="gone"):  # while a checkpoint is written
        server.recover(ServerDied("gone"))
    assert not events and server.restarts == 0


@pytest.mark.parametrize(
    ("said", "rounds_to"),
    [
        ({"dtype": "bfloat16", "device": "cuda"}, "bfloat16"),
        ({"dtype": "auto", "device": "cuda"}, "the dtype of its model"),
        ({}, "the dtype of its model"),
        ({"dtype": "bfloat16", "device": "cuda", "enable_fp32_lm_head": True}, None),
        ({"dtype": "float32", "device": "cuda"}, None),
        ({"dtype": "bfloat16", "device": "cpu"}, None),
    ],
    ids=str,
)
def test_a_server_at_a_url_that_rounds_its_logits_causes_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, said: dict[str, Any], rounds_to: str | None
) -> None:
    page = {"max_req_input_len": 99, "tp_size": 1, **said}
    spec = dataclasses.replace(supervised(tmp_path, []).spec, config=ServerConfig(url="http://h:1"))
    server = SupervisedServer(spec)
    server._client = SimpleNamespace(  # type: ignore[assignment]
        url="http://h:1", info=lambda: read_server_info(page, {"weight_version": "v1"})
    )
    for _ in range(2):
        server.warn_of_rounded_logits()
    expected = (
        f"teacher.server (http://h:1): it rounds its logits to {rounds_to}, which changes each probability ratio by "
        "several percent; start it with --enable-fp32-lm-head, as examples/teacher_server.sh does"
    )
    assert [record.getMessage() for record in caplog.records] == [expected] * (rounds_to is not None)


def test_a_server_that_we_start_is_not_asked_whether_it_rounds_its_logits(tmp_path: Path) -> None:
    supervised(tmp_path, []).warn_of_rounded_logits()


MOVES = (
    ["/pause_generation", "/flush_cache", "/release_memory_occupation"],
    ["/resume_memory_occupation", "/continue_generation"],
)


def test_memory_is_given_back_by_an_idle_server_and_taken_back_once(tmp_path: Path) -> None:
    """SGLang ends if a request runs while memory is given back, or if memory is taken back twice."""
    with fake_server() as fake:
        server = supervised(tmp_path, [])
        server._client = SglangClient(fake.url, server.config, key="rollout.server", alive=lambda: True)
        server.resume_memory()
        assert fake.paths() == []
        server.release_memory()
        assert fake.paths() == MOVES[0] and fake.released
        server.resume_memory()
        server.resume_memory()
        assert fake.paths() == MOVES[0] + MOVES[1] and not fake.released and not fake.paused


def test_a_restarted_server_has_its_memory(tmp_path: Path) -> None:
    events: list[str] = []
    server = supervised(tmp_path, events)
    with fake_server() as fake:
        server._client = SglangClient(fake.url, server.config, key="rollout.server", alive=lambda: True)
        server.release_memory()
        server.recover(ServerDied("gone"))
        server.resume_memory()
        assert "/resume_memory_occupation" not in fake.paths() and events == ["restart"]


@pytest.mark.parametrize("path", ["release_memory_occupation", "resume_memory_occupation", "flush_cache?timeout=30"])
@pytest.mark.parametrize(("status", "said"), [(400, "answered 400"), (404, "has no")])
def test_a_refused_request_about_memory_is_one_line_that_names_the_key(
    tmp_path: Path, path: str, status: int, said: str
) -> None:
    server = supervised(tmp_path, [])
    with scripted(**{path: [(status, {"error": "out of memory"})]}) as found:
        server._client = SglangClient(found.url, ServerConfig(max_retries=0), key="rollout.server")
        with pytest.raises(ServerError) as refused:
            server.release_memory()
            server.resume_memory()
    line = str(refused.value)
    assert f"/{path}" in line and said in line and "\n" not in line
    assert line.endswith("; set teacher.server.release_memory=false")
