"""Launchers that meet over a real store on loopback: duplicates, replaced launchers and nodes that do not come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.faults.rows_messages import _free_port
from tropd_mcore.train import rendezvous
from tropd_mcore.train.exits import EXPLAINED, LOST
from tropd_mcore.train.other_nodes import OtherNodes
from tropd_mcore.train.rendezvous import LaunchError, NodesMeet, Place

LIMIT_S = 60.0


class Launcher:
    """A launcher that joins a job in a thread."""

    def __init__(self, place: Place, limit_s: float = LIMIT_S) -> None:
        self.others = OtherNodes(place.node_rank, place.nodes, LIMIT_S, lambda reason: None)
        self.meet = NodesMeet(place, self.others, limit_s=limit_s)
        self.error: Exception | None = None
        self.joined = False
        self._thread = threading.Thread(target=self._join, daemon=True)
        self._thread.start()

    def _join(self) -> None:
        try:
            self.meet.next_rendezvous()
            self.joined = True
        except Exception as error:
            self.error = error

    def wait(self) -> Launcher:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        return self

    def die(self) -> None:
        """Give no further signs of life, and hold the store no longer."""
        self.others._over.set()
        self.others._thread.join(LIMIT_S)


@pytest.fixture
def place() -> Place:
    return Place(2, 0, "127.0.0.1", int(_free_port()), 2, "digest")


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rendezvous, "HOLDER_S", 0.5)
    monkeypatch.setattr(rendezvous, "POLL_S", 0.02)
    monkeypatch.setattr(rendezvous, "ATTEMPT_S", 0.5)
    monkeypatch.setattr("tropd_mcore.train.other_nodes.BEAT_S", 0.1)
    yield


def second(place: Place) -> Place:
    return replace(place, node_rank=1)


def test_nodes_know_each_other_by_host_and_ranks_after_they_have_met(place: Place) -> None:
    nodes = [Launcher(place), Launcher(second(place))]
    assert all(node.wait().joined for node in nodes)
    name = nodes[0].others._names[1]
    assert name.startswith("node 1 (") and name.endswith(", ranks 2 to 3)")
    for node in reversed(nodes):
        node.others.leave(linger=False)


def test_a_second_launcher_with_the_number_of_a_living_one_is_refused(place: Place) -> None:
    place = replace(place, nodes=3)
    first, other = Launcher(place), Launcher(second(place))
    while other.others._store is None:
        time.sleep(0.01)
    error = Launcher(second(place)).wait().error
    assert isinstance(error, LaunchError) and error.code == EXPLAINED
    assert str(error).startswith("NODE_RANK=1 is taken by ") and "0 to 2" in str(error)
    assert not first.joined


def test_a_launcher_that_replaces_a_dead_one_before_the_start_takes_its_number(place: Place) -> None:
    place = replace(place, nodes=3)
    first, dead = Launcher(place), Launcher(second(place))
    while dead.others._store is None:
        time.sleep(0.01)
    dead.die()
    fresh = Launcher(second(place))
    while fresh.others._store is None:
        time.sleep(0.01)
    last = Launcher(replace(place, node_rank=2))
    assert fresh.wait().joined and last.wait().joined and first.wait().joined


def test_a_launcher_that_replaces_a_dead_one_of_a_running_job_waits_and_joins_the_next_job(place: Place) -> None:
    old = [Launcher(place), Launcher(second(place))]
    assert all(node.wait().joined for node in old)
    old[1].die()
    fresh = Launcher(second(place))
    time.sleep(1.5)
    assert fresh.error is None and not fresh.joined
    old[0].die()
    old[0].meet.store = old[0].others._store = None  # the store ends with its launcher
    old.clear()
    again = Launcher(place)
    assert again.wait().joined and fresh.wait().joined


def test_a_launcher_in_the_place_of_a_dead_one_whose_job_does_not_end_gives_up(place: Place) -> None:
    old = [Launcher(place), Launcher(second(place))]
    assert all(node.wait().joined for node in old)
    old[1].die()
    error = Launcher(second(place), limit_s=1.0).wait().error
    assert isinstance(error, LaunchError) and error.code == LOST
    assert "which gives no sign of life, and its job has not ended in 1 s" in str(error)
    old[0].others.leave(linger=False)


def test_nodes_that_do_not_come_are_named_and_the_exit_code_says_that_the_command_may_be_repeated(place: Place) -> None:
    error = Launcher(place, limit_s=0.3).wait().error
    assert isinstance(error, LaunchError) and error.code == LOST
    assert str(error).startswith("node 1 of 2 did not join in 0.3 s")
    error = Launcher(second(replace(place, port=int(_free_port()))), limit_s=0.3).wait().error
    assert isinstance(error, LaunchError) and error.code == LOST
    assert str(error).startswith("no launcher answers at MASTER_ADDR=127.0.0.1")


def test_nodes_with_other_settings_are_refused(place: Place) -> None:
    nodes = [Launcher(place), Launcher(replace(second(place), job="another"))]
    for node in nodes:
        error = node.wait().error
        assert isinstance(error, LaunchError) and error.code == EXPLAINED
        assert "was started with other settings" in str(error)
