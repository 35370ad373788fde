"""The watch over a server of another node: what is started again, what is left alone, and when it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tropd_mcore.errors import ServerDied, ServerError, ServerHung, StopRequested
from tropd_mcore.serving import keeper as keeper_module
from tropd_mcore.serving.keeper import Keeper

LIMIT_S = 20.0


class Server:
    """A server whose process ends or stops when the test says so."""

    def __init__(self, restarts: int = 9) -> None:
        self.spec = SimpleNamespace(key="teacher.servers.1", called="teacher.servers.1")
        self.config = SimpleNamespace(hang_timeout_s=0.05)
        self.client = SimpleNamespace(url="http://there")
        self.process = SimpleNamespace(stopped=lambda: self.is_stopped)
        self.is_stopped: str | None = None
        self.is_dead = False
        self.fault: Exception | None = None
        self.restarts = restarts
        self.recovered: list[ServerError] = []
        self.done = threading.Event()

    def ended(self) -> ServerDied | None:
        return ServerDied("killed by signal 9") if self.is_dead else None

    def begin_recovery(self, error: ServerError) -> None:
        self.recovered.append(error)
        self.done.set()
        if self.fault is not None:
            raise self.fault
        self.is_dead, self.is_stopped = False, None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(keeper_module, "POLL_S", 0.005)
    made = Server()
    yield made
    assert not [thread for thread in threading.enumerate() if thread.name == "keeper of teacher.servers.1"]


def kept(server: Any) -> Keeper:
    keeper = Keeper(server)
    keeper.start()
    return keeper


def test_a_dead_server_is_started_again_every_time(server: Any) -> None:
    keeper = kept(server)
    for _ in range(2):
        server.done.clear()
        server.is_dead = True
        assert server.done.wait(LIMIT_S)
    keeper.stop()
    assert [type(error) for error in server.recovered] == [ServerDied] * 2


def test_a_server_that_runs_is_left_alone(server: Any) -> None:
    keeper = kept(server)
    time.sleep(0.1)
    keeper.stop()
    assert server.recovered == []


def test_a_stopped_server_is_started_again_after_its_limit(server: Any) -> None:
    keeper = kept(server)
    server.is_stopped = "its process (pid 7) is stopped (state T)"
    assert server.done.wait(LIMIT_S)
    keeper.stop()
    (error,) = server.recovered
    assert isinstance(error, ServerHung)
    assert str(error).startswith("teacher.servers.1: hung: its process (pid 7) is stopped (state T) for 0.05 s")


def test_a_server_that_is_stopped_for_a_short_time_is_left_alone(server: Any) -> None:
    server.config.hang_timeout_s = 60.0
    keeper = kept(server)
    server.is_stopped = "stopped"
    time.sleep(0.05)
    server.is_stopped = None
    time.sleep(0.05)
    keeper.stop()
    assert server.recovered == []


@pytest.mark.parametrize("fault", [ServerDied("max_restarts=2 are used up"), StopRequested(15)])
def test_the_watch_ends_when_no_restart_is_left_or_the_job_stops(
    server: Any, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    server.fault, server.is_dead = fault, True
    keeper = kept(server)
    assert server.done.wait(LIMIT_S)
    keeper.stop()
    assert len(server.recovered) == 1
    said = "max_restarts=2 are used up; it is given up" in caplog.text
    assert said == isinstance(fault, ServerDied)
