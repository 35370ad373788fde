"""The watch of the ranks, over a store in memory, with a clock that the test advances."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import HashStore

from tests.glue.stubs import make_config
from tropd_mcore.mcore.collective import Meetings
from tropd_mcore.train import watch as watch_module
from tropd_mcore.train.watch import Watch

RANK_LIMIT_S, STALL_LIMIT_S = 12.0, 600.0


class Ranks:
    """Watches of all ranks of a job on one store. `said` has the messages that would have ended the job."""

    def __init__(self, tmp_path: Path, count: int) -> None:
        limits = {"rank_timeout_s": RANK_LIMIT_S, "stall_timeout_s": STALL_LIMIT_S}
        run = make_config(tmp_path, run=limits).run
        self.store = HashStore()
        self.meetings = [Meetings() for _ in range(count)]
        self.said: list[tuple[int, str]] = []
        self.all = [
            Watch(run, rank, count, lambda: self.store, self.meetings[rank], end=self._end_of(rank))
            for rank in range(count)
        ]

    def _end_of(self, rank: int) -> Callable[[str], None]:
        return lambda line: self.said.append((rank, line))

    def go_on(self, turns: int, *, but: tuple[int, ...] = (), seconds: float = 2.0) -> None:
        """This many turns of every rank except those in `but`."""
        for _ in range(turns):
            for rank, watch in enumerate(self.all):
                if rank not in but:
                    watch.turn(self.store, seconds)


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_any_rank_without_a_heartbeat_is_named_by_the_rank_before_it(tmp_path: Path, silent: int) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.go_on(3)
    ranks.go_on(5, but=(silent,))
    assert ranks.said == []
    ranks.go_on(3, but=(silent,))
    (observer, line), *_ = ranks.said
    assert observer == (silent - 1) % 3
    assert line.startswith(f"rank {silent} (") and "no sign of life for 12 s" in line and "run.rank_timeout_s" in line


def test_a_rank_with_repeatedly_late_heartbeats_is_not_blamed(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    for _ in range(5):
        ranks.go_on(5, but=(1,))
        ranks.go_on(1)
    assert ranks.said == []


def test_a_rank_that_starts_late_is_not_blamed_but_one_that_never_starts_is(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.go_on(299, but=(1,))
    assert ranks.said == []
    ranks.go_on(5, but=(1,))
    assert ranks.said[0][1].startswith("rank 1 has not begun 602 s after rank 0")


def test_a_store_that_does_not_answer_is_reported_and_does_not_block_the_thread(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    held, missed = threading.Event(), threading.Event()
    watch = ranks.all[1]
    watch._interval_s = 0.02
    watch._connect = lambda: held.wait() and ranks.store  # type: ignore[assignment,return-value]
    watch._miss_store = lambda error, seconds: missed.set()  # type: ignore[method-assign]
    watch.start()
    assert missed.wait(60)
    held.set()
    watch.close()
    assert not watch._thread.is_alive()


def test_a_rank_that_has_left_is_not_blamed(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.go_on(2)
    leaver = ranks.all[1]
    leaver._store = ranks.store
    leaver._over.set()
    leaver._loop()
    ranks.go_on(20, but=(1,))
    assert ranks.said == []


def test_a_job_without_progress_on_any_rank_ends_with_a_line_that_names_the_awaited_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(tmp_path, 2)
    monkeypatch.setattr(watch_module.progress, "activity", lambda: "model forward")
    with ranks.meetings[0].attend():
        ranks.go_on(int(STALL_LIMIT_S / 2))
        assert ranks.said == []
        ranks.go_on(4)
    (rank, line), *_ = ranks.said
    assert rank == 0 and "no rank has made progress for 600 s" in line
    assert "the others wait for rank 1 (model forward)" in line and "run.stall_timeout_s" in line


def test_a_job_with_progress_on_one_rank_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path, 2)
    ticks = iter(range(10**6))
    monkeypatch.setattr(watch_module.progress, "ticks", lambda: next(ticks))
    ranks.go_on(int(STALL_LIMIT_S))
    assert ranks.said == []


def test_rank_0_logs_every_half_minute_which_ranks_it_waits_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    ranks = Ranks(tmp_path, 2)
    now = [100.0]
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: now[0])
    ranks.meetings[0].count, ranks.meetings[0].since = 1, 100.0
    for _ in range(40):
        now[0] += 2.0
        ranks.go_on(1)
    lines = [message for message in caplog.messages if message.startswith("waiting for rank 1")]
    assert [line.rsplit(", ", 1)[1] for line in lines] == ["30 s", "60 s"]
