"""Servers that keep the weights of their folder: one call for all of them, and what it does with those that fail."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tropd_mcore.errors import GateError, ServerDied, ServerError
from tropd_mcore.serving import fleet as fleet_module
from tropd_mcore.serving.fleet import ServerFleet, fleet_of
from tropd_mcore.serving.wire import GenerationRequest
from tropd_mcore.serving.work import Dispatched


class Server:
    """A server that only records what it is asked."""

    def __init__(self, place: int, *, started: bool = True, restarts: int = 9, kept: bool = False) -> None:
        self.key = f"teacher.servers.{place}"
        self.spec: Any = SimpleNamespace(key=self.key, called=self.key, log_path="its.log")
        self.config: Any = SimpleNamespace(start_timeout_s=60.0, node=1)
        self.client: Any = self
        self.is_started = started
        self.is_kept_elsewhere = kept
        self.after_restart: Any = None
        self.restarts = restarts
        self.ready = True
        self.did: list[str] = []

    def is_ready(self) -> bool:
        return self.ready

    def answers(self) -> bool:
        return self.ready

    def ended(self) -> ServerDied | None:
        return None

    def may_come_back(self) -> bool:
        return True

    def begin_recovery(self, error: ServerError) -> None:
        if not self.is_started or self.is_kept_elsewhere:
            raise error
        if not self.restarts:
            raise ServerDied(f"{error}; max_restarts are used up")
        self.restarts -= 1
        self.did.append("recovery")

    def recover(self, error: ServerError) -> None:
        self.begin_recovery(error)
        if self.after_restart is not None:
            self.after_restart()


def request(token: int) -> GenerationRequest:
    return GenerationRequest(np.array([token], np.int32), max_new_tokens=2, vocab_size=50)


Round = dict[str, Any]
"""What one call of `generate_on` does: answers, and servers that are lost, by their keys."""


class Rounds:
    """Stands in for `generate_on`: plays one round after the other; a request is answered with its first token."""

    def __init__(self, *rounds: dict[str, ServerError], may_return: Sequence[str] = ()) -> None:
        self.rounds = list(rounds)
        self.may_return = may_return
        self.asked: list[tuple[list[str], list[int]]] = []

    def __call__(self, clients: Any, requests: Any, *, speeds: Any) -> Any:
        keys = [client.key for client in clients]
        assert len(speeds) == len(keys)
        self.asked.append((keys, [int(each.input_ids[0]) for each in requests]))
        failing = self.rounds.pop(0) if self.rounds else {}
        lost = {keys.index(key): error for key, error in failing.items()}
        answers: list[Any] = [int(each.input_ids[0]) for each in requests]
        if len(lost) == len(keys):
            answers[len(answers) // 2 :] = [next(iter(lost.values()))] * (len(answers) - len(answers) // 2)
        may_return = {place for place in lost if keys[place] in self.may_return}
        return Dispatched(answers, lost=lost, may_return=may_return, speeds={})


def played(monkeypatch: pytest.MonkeyPatch, *rounds: dict[str, ServerError], **given: Any) -> Rounds:
    found = Rounds(*rounds, **given)
    monkeypatch.setattr(fleet_module, "generate_on", found)
    monkeypatch.setattr(fleet_module, "POLL_S", 0.01)
    return found


def key(place: int) -> str:
    return f"teacher.servers.{place}"


def test_received_answers_are_kept_and_a_single_server_is_asked_for_the_rest_after_its_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(0)
    rounds = played(monkeypatch, {key(0): ServerDied("gone")})
    assert fleet_of(server).generate([request(token) for token in (1, 2, 3, 4)]) == [1, 2, 3, 4]  # type: ignore[arg-type, comparison-overlap]
    assert rounds.asked == [([key(0)], [1, 2, 3, 4]), ([key(0)], [3, 4])] and server.did == ["recovery"]


def test_a_single_server_at_a_url_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    played(monkeypatch, {key(0): ServerDied("gone elsewhere")})
    with pytest.raises(ServerDied, match="gone elsewhere"):
        fleet_of(Server(0, started=False)).generate([request(1)])  # type: ignore[arg-type]


def test_the_others_go_on_while_a_server_starts_again_and_it_is_checked_before_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    servers: Any = [Server(0), Server(1)]
    servers[1].after_restart = lambda: servers[1].did.append("checked")
    rounds = played(monkeypatch, {key(1): ServerDied("gone")})
    fleet = ServerFleet(servers)
    fleet.generate([request(1)])
    servers[1].ready = False
    fleet.generate([request(2)])
    servers[1].ready = True
    fleet.generate([request(3)])
    assert [keys for keys, _ in rounds.asked] == [[key(0), key(1)], [key(0)], [key(0), key(1)]]
    assert servers[1].did == ["recovery", "checked"]
    assert "gone: 1 of 2 servers go on" in caplog.text


def test_a_new_process_that_serves_another_model_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    servers: Any = [Server(0), Server(1)]

    def other() -> None:
        raise GateError("another model")

    servers[1].after_restart = other
    played(monkeypatch, {key(1): ServerDied("gone")})
    fleet = ServerFleet(servers)
    fleet.generate([request(1)])
    with pytest.raises(GateError, match="another model"):
        fleet.generate([request(2)])


def test_a_server_that_others_keep_takes_part_again_when_it_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One at a url, and one of another node, which its rank starts again; both are checked."""
    caplog.set_level(logging.INFO)
    for second in (Server(1, started=False), Server(1, kept=True)):
        caplog.clear()
        servers: Any = [Server(0), second]
        second.after_restart = partial(second.did.append, "checked")
        rounds = played(monkeypatch, {key(1): ServerDied("silent")})
        second.ready = False
        fleet = ServerFleet(servers)
        for _ in range(2):
            fleet.generate([request(1)])
        second.ready = True
        fleet.generate([request(1)])
        assert [len(keys) for keys, _ in rounds.asked] == [2, 1, 2] and second.did == ["checked"]
        assert f"{key(1)}: it takes requests again" in caplog.text


def test_the_only_server_on_another_node_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    server: Any = Server(0, kept=True)
    rounds = played(monkeypatch, {key(0): ServerDied("no connection")})
    assert fleet_of(ServerFleet([server])).generate([request(1), request(2)]) == [1, 2]  # type: ignore[comparison-overlap]
    assert rounds.asked[1] == ([key(0)], [2])


def test_a_server_of_another_node_that_does_not_come_back_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    servers: Any = [Server(0, kept=True), Server(1, kept=True)]
    played(monkeypatch, {key(0): ServerDied("no connection to 0"), key(1): ServerDied("no connection to 1")})
    for server in servers:
        server.ready, server.config.start_timeout_s = False, 0.05
    end = f"not back after {key(0)}.start_timeout_s=0.05 s; its log is on node 1: its.log"
    with pytest.raises(ServerDied, match=f"no connection to 0; {re.escape(end)}"):
        ServerFleet(servers).generate([request(1), request(2)])
    assert f"{end}: given up" in caplog.text


def test_a_slow_server_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    servers: Any = [Server(0), Server(1)]
    played(monkeypatch, {key(1): ServerError("slow")}, may_return=[key(1)])
    ServerFleet(servers).generate([request(1)])
    assert servers[1].did == []


def test_if_all_are_lost_the_first_that_is_ready_again_gets_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    servers: Any = [Server(0), Server(1)]
    rounds = played(monkeypatch, {key(0): ServerDied("a"), key(1): ServerDied("b")})
    assert ServerFleet(servers).generate([request(1), request(2)]) == [1, 2]  # type: ignore[comparison-overlap]
    assert rounds.asked[1] == ([key(0), key(1)], [2])


def test_a_call_ends_when_the_restarts_of_all_servers_are_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    servers: Any = [Server(0, restarts=0), Server(1, restarts=0)]
    played(monkeypatch, {key(0): ServerDied("a"), key(1): ServerDied("b")})
    with pytest.raises(ServerDied, match="max_restarts are used up"):
        ServerFleet(servers).generate([request(1)])
