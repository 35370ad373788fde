"""Detects dead, hanging and late ranks, with one thread per rank and the store of the job.

Each rank regularly writes a beat (a small status record) into the store, and checks the beat of the next rank in a
ring, so every rank is checked. This module does not watch servers (`serving`), and a launcher watches its own ranks
separately (`launch`). Invariants: the job is ended, with one line that names the rank, if a rank has no new beat for
run.rank_timeout_s or if no rank makes progress for run.stall_timeout_s. Time counts only while the checking process
itself runs, so a machine that slept causes no error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from tropd_mcore import progress, signals
from tropd_mcore.config.schema import RunConfig
from tropd_mcore.mcore.collective import Meetings
from tropd_mcore.train.exits import LOST
from tropd_mcore.train.silence import Silence

log = logging.getLogger(__name__)

BEAT_S = 2.0
"""Time between two beats, and between two checks; shorter if run.rank_timeout_s is short."""
WAITING_S = 30.0
"""Rank 0 logs which ranks it waits for after this time, and again after each further period of this length."""
CLOSE_LIMIT_S = 3.0
BEGIN_LIMIT_S = 600.0
"""Longest time between the first beats of two neighbouring ranks, which start together."""
LEFT = -1
"""Number of the last beat of a rank that has finished."""
STORE_TIMEOUT = timedelta(seconds=20)
OTHERS_WAIT_S = 10.0
"""Added to the limit of a silent first node on all ranks of a node but the first, so one of them reports it."""


@dataclass(frozen=True)
class Beat:
    """Status record of a rank."""

    number: int
    host: str
    pid: int
    activity: str
    ticks: int
    """Grows whenever the rank makes progress."""
    meetings: int
    """Number of collectives of the control group that it has entered."""
    waits: bool
    """Whether it is inside one of them now."""

    def who(self, rank: int) -> str:
        """Return the name of the rank for a message."""
        return f"rank {rank} ({self.host}, pid {self.pid})"

    def at(self) -> str:
        """Return what the rank was doing, for the end of a sentence."""
        return f", in {self.activity}" if self.activity else ""


class Watch:
    """The watch thread of one rank. If the job must end, `end` is called with the line to print."""

    def __init__(
        self,
        run: RunConfig,
        rank: int,
        world_size: int,
        connect: Callable[[], Store],
        meetings: Meetings,
        *,
        end: Callable[[str], None],
    ) -> None:
        self._run = run
        self._rank = rank
        self._world_size = world_size
        self._connect = connect
        self._meetings = meetings
        self._end = end
        self._store: Store | None = None
        self._number = 0
        self._interval_s = min(BEAT_S, run.rank_timeout_s / 6)
        self._next = Silence()
        self._job = Silence()
        self._told_s = 0.0
        self._unreachable_s = 0.0
        self._last = time.monotonic()
        self._known: set[int] = set()
        """Ranks that have written a beat."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)

    def start(self) -> None:
        """Start the thread. It ends with the process or with `close`."""
        self._thread.start()

    def close(self) -> None:
        """Stop, and write that this rank has left, because ranks finish one after the other at the end of a job."""
        self._over.set()
        self._thread.join(CLOSE_LIMIT_S)

    def _loop(self) -> None:
        turn, since_turn = None, 0.0
        while not self._over.wait(self._interval_s):
            now = time.monotonic()
            # Limit the time that counts: this process may have been stopped, or the machine may have slept.
            seconds, self._last = min(now - self._last, 2 * self._interval_s + 1.0), now
            since_turn += seconds
            if turn is not None and (turn.is_alive() or turn.error is not None):
                self._miss_store(turn.error or TimeoutError("no answer"), seconds)
            elif turn is not None:
                self._unreachable_s = 0.0
            if turn is None or not turn.is_alive():
                turn, since_turn = _Turn(self, since_turn), 0.0
                turn.start()
                turn.join(self._interval_s)
        if turn is not None:
            turn.join(CLOSE_LIMIT_S / 2)
        if self._store is not None and (turn is None or not turn.is_alive()):
            with contextlib.suppress(RuntimeError):
                self._number = LEFT
                self._store.set(f"beat/{self._rank}", json.dumps(asdict(self._beat())))

    def try_turn(self, seconds: float) -> None:
        """Run `turn` over a separate connection, which is opened if needed. Raises RuntimeError, as a store does."""
        try:
            if self._store is None:
                self._store = self._connect()
            self.turn(self._store, seconds)
        except RuntimeError:
            self._store = None
            raise

    def turn(self, store: Store, seconds: float) -> None:
        """Write one beat, then check the others, `seconds` after the last turn."""
        self._number += 1
        store.set(f"beat/{self._rank}", json.dumps(asdict(self._beat())))
        beats = self._read(store, range(self._world_size) if self._rank == 0 else [self._neighbour])
        self._look_at_neighbour(beats.get(self._neighbour), seconds)
        if self._rank == 0:
            self._look_at_job(beats, seconds)

    @property
    def _neighbour(self) -> int:
        return (self._rank + 1) % self._world_size

    def _beat(self) -> Beat:
        return Beat(
            number=self._number,
            host=socket.gethostname(),
            pid=os.getpid(),
            activity=progress.activity(),
            ticks=progress.ticks(),
            meetings=self._meetings.count,
            waits=self._meetings.since is not None,
        )

    def _read(self, store: Store, ranks: range | list[int]) -> dict[int, Beat]:
        """Return the beats of those of `ranks` that have written one."""
        self._known.update(rank for rank in ranks if rank not in self._known and store.check([f"beat/{rank}"]))
        there = sorted(self._known)
        if not there:
            return {}
        texts = store.multi_get([f"beat/{rank}" for rank in there])
        return {rank: Beat(**json.loads(text)) for rank, text in zip(there, texts, strict=True)}

    def _look_at_neighbour(self, beat: Beat | None, seconds: float) -> None:
        """End the job if the next rank has been silent for too long, or has not started long after this rank."""
        limit = self._run.rank_timeout_s
        if beat is None:
            if self._next.look(None, seconds) > max(limit, BEGIN_LIMIT_S):
                self._end(
                    f"rank {self._neighbour} has not begun {self._next.still_s:.0f} s after rank {self._rank}: is it "
                    "stopped, or does it wait for a file system? The same command resumes"
                )
            return
        if beat.number == LEFT or self._next.look((beat.pid, beat.number), seconds) <= limit:
            return
        self._end(
            f"{beat.who(self._neighbour)} has given no sign of life for {limit:g} s{beat.at()}: is it stopped "
            "(SIGSTOP), swapping, or is its machine gone? (run.rank_timeout_s); the same command resumes"
        )

    def _look_at_job(self, beats: dict[int, Beat], seconds: float) -> None:
        """On rank 0: log which ranks are waited for, and end the job if no rank makes progress."""
        still = self._job.look(
            [(beat.ticks, beat.meetings, beat.waits, beat.activity) for beat in beats.values()], seconds
        )
        if still > self._run.stall_timeout_s:
            self._end(
                f"no rank has made progress for {self._run.stall_timeout_s:g} s; {self._waited_for(beats)} "
                "(run.stall_timeout_s); the same command resumes"
            )
        since = self._meetings.since
        waited = time.monotonic() - since if since is not None else 0.0
        if waited < WAITING_S:
            self._told_s = 0.0
        elif waited - self._told_s >= WAITING_S:
            self._told_s = waited
            log.info("waiting for %s, %.0f s", self._waited_for(beats, waiting=True), waited)

    def _waited_for(self, beats: dict[int, Beat], *, waiting: bool = False) -> str:
        """Return text about the ranks that the others wait for."""
        absent = [f"rank {rank} (has not begun)" for rank in range(self._world_size) if rank not in beats]
        return _listed(absent) if absent else _late(beats, waiting=waiting)

    def _miss_store(self, error: Exception, seconds: float) -> None:
        """Handle a store that is not reachable: its launcher, or the launcher's machine, is stopped or gone."""
        before, self._unreachable_s = self._unreachable_s, self._unreachable_s + seconds
        if before < WAITING_S <= self._unreachable_s:
            log.warning(
                "the launcher of the first node does not answer (%s): is it stopped, or its machine gone?",
                str(error).partition("\n")[0][:200],
            )
        # The first rank of a node reports it; the others wait for their launcher to end them.
        limit_s = self._run.rank_timeout_s + (OTHERS_WAIT_S if os.environ.get("LOCAL_RANK", "0") != "0" else 0.0)
        if self._unreachable_s > limit_s and os.environ.get("GROUP_RANK", "0") != "0":
            self._end(
                f"rank {self._rank} ({socket.gethostname()}): the launcher of the first node has not answered for "
                f"{self._run.rank_timeout_s:g} s (run.rank_timeout_s); the same command resumes"
            )


def _late(beats: dict[int, Beat], *, waiting: bool = False) -> str:
    """Return the ranks that entered fewer collectives than the others; if there are none, what each rank is doing."""
    most = max(beat.meetings for beat in beats.values())
    late = {rank: beat for rank, beat in beats.items() if beat.meetings < most}
    if not late:
        # All ranks have entered equally many collectives, so the work of a rank outside of one does not end.
        late = {rank: beat for rank, beat in beats.items() if not beat.waits} or beats
    text = _listed([f"rank {rank} ({beat.activity or 'no long work'})" for rank, beat in late.items()])
    if waiting:
        return text
    return f"the others wait for {text}" if len(late) < len(beats) else f"current work: {text}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class _Turn(threading.Thread):
    """Runs one turn in a separate thread, because a store whose process is stopped never answers or times out."""

    def __init__(self, watch: Watch, seconds: float) -> None:
        super().__init__(name="watch turn", daemon=True)
        self._watch, self._seconds = watch, seconds
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._watch.try_turn(self._seconds)
        except RuntimeError as error:  # base class of every store error
            self.error = error


def open_watch(run: RunConfig, rank: int, world_size: int, meetings: Meetings) -> Watch:
    """Start the watch of this rank over the store at MASTER_ADDR and MASTER_PORT."""

    def connect() -> Store:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)
        return PrefixStore("tropd/watch", client)

    def end(line: str) -> None:
        signals.say(f"error: {line}")
        signals.end(LOST)

    watch = Watch(run, rank, world_size, connect, meetings, end=end)
    watch.start()
    return watch
