"""Launchers of several nodes on one store in memory, with a clock that the test advances."""

from __future__ import annotations

import pytest
from torch.distributed import HashStore

from tropd_mcore.train import other_nodes
from tropd_mcore.train.exits import BUG, LOST
from tropd_mcore.train.other_nodes import Cause, OtherNodes

LIMIT_S = 60.0


class Clock:
    """Stands for the module `time`. Sleeping calls `then`, which stands for the threads of all launchers."""

    def __init__(self) -> None:
        self.now = 0.0
        self.then = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then()


class Job:
    """Launchers on one store, whose threads are replaced by `go_on`. `asked` are the nodes that were asked to stop."""

    def __init__(self, count: int, clock: Clock) -> None:
        self.store, self.clock = HashStore(), clock
        self.asked: list[tuple[int, str]] = []
        self.all = [OtherNodes(rank, count, LIMIT_S, self._asked_of(rank)) for rank in range(count)]
        for each in self.all:
            each._thread.start = lambda: None  # type: ignore[method-assign]
            each.begin(self.store)
        for each in self.all:
            each.join({rank: f"node {rank} (host{rank}, rank {rank})" for rank in range(count)})

    def _asked_of(self, rank: int):  # type: ignore[no-untyped-def]
        return lambda reason: self.asked.append((rank, reason))

    def turn(self, *, but: tuple[int, ...] = ()) -> None:
        for rank, each in enumerate(self.all):
            if rank not in but:
                each.turn(self.store, 2.0)

    def go_on(self, seconds: float, *, but: tuple[int, ...] = (), cut: tuple[int, ...] = ()) -> list[Cause | None]:
        """Time passes on every node except `but`; the store does not answer nodes in `cut`. Returns what nodes say."""
        said: list[Cause | None] = [None] * len(self.all)
        for _ in range(int(seconds / 2)):
            self.turn(but=but + cut)
            for _ in range(4):
                self.clock.now += 0.5
                said = [None if rank in but else each.look() for rank, each in enumerate(self.all)]
        return said


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(other_nodes, "time", made)
    return made


def test_a_node_that_is_gone_is_named_on_every_other_node_within_the_limit(clock: Clock) -> None:
    job = Job(4, clock)
    job.go_on(10)
    assert job.go_on(LIMIT_S, but=(2,)) == [None] * 4
    first, *_ = job.go_on(6, but=(2,))
    assert first is not None and first.code == LOST
    assert first.line.startswith("no sign of life for 60 s from node 2 (host2, rank 2): ")
    assert "run.node_timeout_s" in first.line and first.line.endswith("the same command resumes")
    job.all[0].tell(first)
    job.turn(but=(0, 2))
    for rank in (1, 3):
        heard = job.all[rank].look()
        assert heard == Cause(f"node {rank} was stopped because of another one: {first.line}", LOST)


def test_nodes_that_are_lost_together_are_named_in_one_line(clock: Clock) -> None:
    job = Job(7, clock)
    job.go_on(4)
    first, *_ = job.go_on(LIMIT_S + 4, but=(1, 2, 3, 5, 6))
    assert first is not None
    assert "from node 1 (host1, rank 1), node 2" in first.line and "node 5 (host5, rank 5) and 1 more:" in first.line


def test_a_node_that_stood_still_for_less_than_the_limit_does_not_end_the_job(clock: Clock) -> None:
    job = Job(2, clock)
    for _ in range(4):
        job.go_on(LIMIT_S - 4, but=(1,))
        assert job.go_on(4) == [None, None]
        job.go_on(LIMIT_S - 4, but=(0,), cut=(1,))
        assert job.go_on(4) == [None, None]


def test_a_store_that_does_not_answer_for_the_limit_names_the_first_node(clock: Clock) -> None:
    job = Job(3, clock)
    job.go_on(10)
    assert job.go_on(LIMIT_S - 2, but=(0,), cut=(1, 2)) == [None] * 3
    _, *others = job.go_on(4, but=(0,), cut=(1, 2))
    for cause in others:
        assert cause is not None and cause.code == LOST
        assert "no sign of life for 60 s from node 0 (host0, rank 0)" in cause.line


def test_a_launcher_that_was_itself_suspended_blames_no_node(clock: Clock) -> None:
    job = Job(2, clock)
    job.go_on(10)
    clock.now += 1000.0
    assert job.go_on(4) == [None, None]


def test_a_node_that_has_finished_is_not_blamed(clock: Clock) -> None:
    job = Job(2, clock)
    job.go_on(4)
    job.store.set("beat/1", other_nodes.LEFT)
    assert job.go_on(2 * LIMIT_S, but=(1,)) == [None, None]


def test_the_cause_of_a_node_and_its_exit_code_reach_the_others_and_the_first_cause_is_kept(clock: Clock) -> None:
    job = Job(3, clock)
    job.all[2].tell(Cause("rank 2 has a bug", BUG))
    job.all[1].tell(Cause("rank 1 lost its peer", LOST))
    job.turn()
    cause = job.all[0].look()
    assert cause == Cause("node 0 was stopped because of another one: rank 2 has a bug", BUG)


def test_a_request_to_stop_reaches_every_node(clock: Clock) -> None:
    job = Job(3, clock)
    job.all[1].ask_others_to_stop("SIGTERM")
    job.turn()
    assert sorted(job.asked) == [(0, "SIGTERM"), (1, "SIGTERM"), (2, "SIGTERM")]


@pytest.mark.parametrize("observer", [0, 2])
def test_a_failure_that_a_lost_node_explains_is_attributed_to_it(clock: Clock, observer: int) -> None:
    job = Job(3, clock)
    job.go_on(10)

    def time_passes() -> None:
        job.turn(but=(1,))
        clock.now += 1.9
        if observer != 0 and (cause := job.all[0].look()) is not None:
            job.all[0].tell(cause)

    clock.then = time_passes
    cause = job.all[observer].await_cause()
    assert cause is not None and "no sign of life for 60 s from node 1 (host1, rank 1)" in cause.line


@pytest.mark.parametrize("observer", [0, 2])
def test_a_failure_is_not_attributed_to_nodes_that_still_give_signs_of_life(clock: Clock, observer: int) -> None:
    job = Job(3, clock)
    job.go_on(10)
    begun = clock.now
    clock.then = job.turn
    assert job.all[observer].await_cause() is None
    assert clock.now - begun < 5.0


def test_the_first_node_keeps_the_store_until_the_others_have_left_but_does_not_wait_for_a_lost_one(
    clock: Clock,
) -> None:
    job = Job(3, clock)
    job.go_on(LIMIT_S + 4, but=(1,))
    first = job.all[0]
    first._thread.join = lambda timeout: None  # type: ignore[method-assign,assignment]
    begun = clock.now
    clock.then = lambda: job.store.set("beat/2", other_nodes.LEFT) if clock.now - begun > 3.0 else None
    first.leave(linger=True)
    assert 3.0 < clock.now - begun < 4.0


def test_a_job_of_one_node_has_nobody_to_talk_to() -> None:
    alone = OtherNodes(0, 1, LIMIT_S, lambda reason: None)
    alone.tell(Cause("a line", BUG))
    alone.ask_others_to_stop("SIGTERM")
    alone.leave(linger=True)
    assert alone.look() is None
