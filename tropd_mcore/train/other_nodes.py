"""What the launcher of one node tells the launchers of the other nodes, and what it hears from them.

Everything goes through the job's store on the first node: signs of life, requests to stop, and why a node ended. Ranks
watch each other separately (`watch`). Invariants: if a node is silent for run.node_timeout_s, because its machine or
its launcher is gone or stands still, the launcher of every other node gets a line that names it. Time counts only while
the watching launcher itself runs. The main thread never waits for the store longer than a limit.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from torch.distributed import Store

from tropd_mcore.train.exits import LOST
from tropd_mcore.train.silence import Silence

BEAT_S = 2.0
"""Time between two signs of life, and between two checks of the messages; shorter if run.node_timeout_s is short."""
TELL_LIMIT_S = 10.0
"""Longest wait until a message is in the store."""
LINGER_S = 10.0
"""Longest time that the first node keeps the store for the others after the end of the job."""
POLL_S = 0.1
ALIVE = 2
"""Number of new signs of life after which a node is not lost; one may be older than the failure."""
LEFT = "left"
"""The last beat of a launcher that ends, and no longer reads messages."""
FAILURE_KEY = "failure"
"""Store key of the cause that ended a node."""
STOP_KEY = "stop"
"""Store key of the signal that asked a node to stop."""


@dataclass(frozen=True)
class Cause:
    """Why the job ends on this node."""

    line: str
    code: int
    """Exit code of the launcher."""


class OtherNodes:
    """The messages between the launchers of a job; one thread reads and writes them."""

    def __init__(self, node_rank: int, nodes: int, limit_s: float, ask_to_stop: Callable[[str], None]) -> None:
        self._node_rank = node_rank
        self._others = [rank for rank in range(nodes) if rank != node_rank]
        self._limit_s = limit_s
        self._interval_s = min(BEAT_S, limit_s / 6)
        self._ask_to_stop = ask_to_stop
        self._store: Store | None = None
        self._names = {rank: f"node {rank}" for rank in range(nodes)}
        self._joined = False
        self._silences = {rank: Silence() for rank in self._others}
        self._store_silence = Silence()
        self._turns = 0
        self._looked = self._turned = time.monotonic()
        self._curious = False
        """Whether this node reads the signs of life although it is not the first one."""
        self._fresh: Counter[int] = Counter()
        """New signs of life of each node since the last failure of this node's ranks."""
        self._cause: Cause | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="other nodes", daemon=True)

    # called by the rendezvous

    def begin(self, store: Store) -> None:
        """Give signs of life through `store` from now on."""
        store.set(beat_key(self._node_rank), "0")
        self._store = store
        self._turned = time.monotonic()
        self._thread.start()

    def join(self, names: Mapping[int, str]) -> None:
        """Watch the other nodes, which have all joined. `names` are their names in messages."""
        self._names.update(names)
        self._joined = True
        self._looked = time.monotonic()

    # called by the main thread of the launcher

    def look(self) -> Cause | None:
        """Return why another node ends the job; None while it goes on. Call it often."""
        if not self._joined:
            return None
        now = time.monotonic()
        seconds, self._looked = min(now - self._looked, 1.0), now
        # A store whose process is frozen or whose machine is gone never answers, whatever the time limit of a call.
        silent_s = self._store_silence.look(self._turns, seconds)
        if self._cause is None and self._node_rank != 0 and silent_s > self._limit_s:
            self._cause = self._stopped_by(Cause(self._no_sign([0]), LOST))
        return self._cause

    def await_cause(self) -> Cause | None:
        """Wait for the cause of a failure of this node's ranks that a lost node explains.

        Returns None if every other node has given a new sign of life, or if there is no other node.
        """
        deadline = time.monotonic() + self._limit_s + 6 * self._interval_s
        self._fresh.clear()
        self._curious = True
        while time.monotonic() < deadline and not self._over.is_set():
            if (cause := self.look()) is not None:
                return cause
            if all(self._fresh[rank] >= ALIVE for rank in self._others):
                return None
            time.sleep(POLL_S)
        return None

    def ask_others_to_stop(self, reason: str) -> None:
        """Let all nodes end at their next safe point."""
        if self._store is not None and self._others:
            with contextlib.suppress(RuntimeError):
                self._store.set(STOP_KEY, reason)

    def asked_to_stop(self) -> bool:
        """Return whether any node was asked to stop, also if the thread has not read that yet."""
        with contextlib.suppress(RuntimeError):
            return self._store is not None and self._store.check([STOP_KEY])
        return False

    def tell(self, cause: Cause, *, limit_s: float = TELL_LIMIT_S) -> None:
        """Tell the other nodes why this node ends. The first cause of a job is kept."""
        store = self._store
        if store is None or not self._joined:
            return

        def write() -> None:
            with contextlib.suppress(RuntimeError):  # the first node is gone, and the others notice that themselves
                store.compare_set(FAILURE_KEY, "", json.dumps(asdict(cause)))

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(limit_s)
        self._over.set()

    def leave(self, *, linger: bool) -> None:
        """End the thread, with a last beat. `linger`: on the first node, keep the store until the others have left."""
        self._over.set()
        if (store := self._store) is None:
            return
        self._thread.join(self._interval_s + 1.0)
        if not linger or self._node_rank != 0:
            return
        deadline = time.monotonic() + LINGER_S
        lost_s = self._limit_s - 2 * self._interval_s
        waiting = {rank for rank, silence in self._silences.items() if silence.still_s <= lost_s}
        while waiting and time.monotonic() < deadline:
            waiting = {rank for rank in waiting if _beat(store, rank) != LEFT}
            time.sleep(POLL_S)

    # the thread

    def _loop(self) -> None:
        store = self._store
        assert store is not None
        while self._cause is None and not self._over.wait(self._interval_s):
            now = time.monotonic()
            # Limit the time that counts: this process may have been stopped, or the machine may have slept.
            seconds, self._turned = min(now - self._turned, 2 * self._interval_s + 1.0), now
            try:
                self.turn(store, seconds)
            except RuntimeError:  # base class of every store error
                if self._joined and not self._over.is_set():
                    self._cause = self._stopped_by(Cause(f"the launcher of {self._names[0]} has ended", LOST))
        with contextlib.suppress(RuntimeError):
            store.set(beat_key(self._node_rank), LEFT)

    def turn(self, store: Store, seconds: float) -> None:
        """Give one sign of life, then read the messages, `seconds` after the last turn."""
        self._turns += 1
        store.set(beat_key(self._node_rank), str(self._turns))
        if not self._joined:
            return
        if store.check([STOP_KEY]):
            self._ask_to_stop(store.get(STOP_KEY).decode())
        if store.check([FAILURE_KEY]):
            self._cause = self._stopped_by(Cause(**json.loads(store.get(FAILURE_KEY))))
        elif self._node_rank == 0 or self._curious:
            self._look_at_others(store, seconds)

    def _look_at_others(self, store: Store, seconds: float) -> None:
        """End the job, on the first node, if a node was silent for too long."""
        silent = []
        for rank, silence in self._silences.items():
            beat = _beat(store, rank)
            self._fresh[rank] += silence.value not in (None, beat) or beat == LEFT
            still_s = silence.look(beat, seconds)
            # Nodes that are lost in one moment, such as those behind one switch, are named together.
            if beat != LEFT and still_s > self._limit_s - 2 * self._interval_s:
                silent.append(rank)
        if self._node_rank == 0 and any(self._silences[rank].still_s > self._limit_s for rank in silent):
            self._cause = Cause(self._no_sign(silent), LOST)

    def _no_sign(self, ranks: list[int]) -> str:
        names = ", ".join(self._names[rank] for rank in ranks[:4])
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return (
            f"no sign of life for {self._limit_s:g} s from {names}{more}: is the machine gone, or its launcher killed "
            "or stopped? (run.node_timeout_s); the same command resumes"
        )

    def _stopped_by(self, cause: Cause) -> Cause:
        return Cause(f"node {self._node_rank} was stopped because of another one: {cause.line}", cause.code)


def beat_key(rank: int) -> str:
    """The store key of a node's sign of life."""
    return f"beat/{rank}"


def _beat(store: Store, rank: int) -> str | None:
    return store.get(beat_key(rank)).decode() if store.check([beat_key(rank)]) else None
