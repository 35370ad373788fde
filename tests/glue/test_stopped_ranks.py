"""How the launcher detects a rank that is suspended before its first heartbeat."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tropd_mcore.train import stopped_ranks
from tropd_mcore.train.stopped_ranks import GRACE_S, StoppedRanks

LIMIT_S = 60.0


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits."""
    started = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield started
    started.kill()
    started.wait()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the launcher, in seconds."""
    now = [0.0]
    monkeypatch.setattr(stopped_ranks.time, "monotonic", lambda: now[0])
    return now


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        pass


def looked(ranks: StoppedRanks, clock: list[float], pid: int, seconds: int) -> tuple[int, str] | None:
    for _ in range(seconds):
        clock[0] += 1.0
        if (found := ranks.look({3: pid})) is not None:
            return found
    return None


def test_a_suspended_rank_is_reported_first_and_later_ends_the_job(
    process: subprocess.Popen[bytes], clock: list[float]
) -> None:
    said: list[str] = []
    ranks = StoppedRanks(LIMIT_S, said.append)
    stop(process)
    assert looked(ranks, clock, process.pid, int(LIMIT_S)) is None
    assert said == [f"rank 3 (pid {process.pid}) is stopped (SIGSTOP); the job ends in 44 s if it stays so"]
    found = looked(ranks, clock, process.pid, 10)
    assert found == (3, f"has been stopped (SIGSTOP) for {LIMIT_S + GRACE_S + 1:.0f} s (run.rank_timeout_s)")


def test_the_waiting_time_of_a_suspended_rank_restarts_after_it_continued(
    process: subprocess.Popen[bytes], clock: list[float]
) -> None:
    ranks = StoppedRanks(LIMIT_S, lambda line: None)
    stop(process)
    assert looked(ranks, clock, process.pid, 50) is None
    process.send_signal(signal.SIGCONT)
    while psutil.Process(process.pid).status() == psutil.STATUS_STOPPED:
        pass
    assert looked(ranks, clock, process.pid, 1) is None
    stop(process)
    assert looked(ranks, clock, process.pid, 50) is None


def test_a_launcher_that_was_itself_suspended_blames_no_rank(
    process: subprocess.Popen[bytes], clock: list[float]
) -> None:
    ranks = StoppedRanks(LIMIT_S, lambda line: None)
    stop(process)
    clock[0] += 1000.0
    assert ranks.look({3: process.pid}) is None


def test_a_rank_that_has_ended_does_not_count_as_suspended(
    process: subprocess.Popen[bytes], clock: list[float]
) -> None:
    ranks = StoppedRanks(LIMIT_S, lambda line: None)
    process.kill()
    process.wait()
    assert looked(ranks, clock, process.pid, 100) is None
