"""Who watches the ranks: over a store in memory, with time that the test lets go by."""

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
    """Watches of all ranks of a job on one store; `said` has what would have ended the job."""

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
        """That many turns of every rank but those."""
        for _ in range(turns):
            for rank, watch in enumerate(self.all):
                if rank not in but:
                    watch.turn(self.store, seconds)


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_rank_without_a_beat_is_named_by_the_one_before_it_whichever_rank_it_is(tmp_path: Path, silent: int) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.go_on(3)
    ranks.go_on(5, but=(silent,))
    assert ranks.said == []
    ranks.go_on(3, but=(silent,))
    (observer, line), *_ = ranks.said
    assert observer == (silent - 1) % 3
    assert line.startswith(f"rank {silent} (") and "no sign of life for 12 s" in line and "run.rank_timeout_s" in line


def test_a_rank_that_beats_late_again_and_again_is_not_accused(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    for _ in range(5):
        ranks.go_on(5, but=(1,))
        ranks.go_on(1)
    assert ranks.said == []


def test_a_rank_that_begins_late_is_not_accused_and_one_that_never_does_is(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.go_on(299, but=(1,))
    assert ranks.said == []
    ranks.go_on(5, but=(1,))
    assert ranks.said[0][1].startswith("rank 1 has not begun 602 s after rank 0")


def test_a_store_that_answers_nothing_is_noticed_and_does_not_stop_the_thread(tmp_path: Path) -> None:
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


def test_a_rank_that_has_left_is_not_accused(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.go_on(2)
    leaver = ranks.all[1]
    leaver._store = ranks.store
    leaver._over.set()
    leaver._loop()
    ranks.go_on(20, but=(1,))
    assert ranks.said == []


def test_a_job_in_which_nobody_gets_on_ends_with_a_line_that_names_who_is_waited_for(
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


def test_a_job_in_which_one_rank_gets_on_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path, 2)
    ticks = iter(range(10**6))
    monkeypatch.setattr(watch_module.progress, "ticks", lambda: next(ticks))
    ranks.go_on(int(STALL_LIMIT_S))
    assert ranks.said == []


def test_after_half_a_minute_rank_0_says_whom_it_waits_for_and_again_after_each_further_one(
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
