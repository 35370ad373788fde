"""Faults: ranks and servers that are suspended (SIGSTOP, a frozen machine), and those that only seem to be."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from tests.faults.launch import send
from tests.faults.scene import Scene
from tests.faults.verdict import Fault, Seen
from tropd_mcore.train.exits import LOST

Play = Callable[[Scene], Seen]
RANK_LIMIT_S = 20.0
"""run.rank_timeout_s of these runs; 120 by default."""


def stop_rank(number: int, edge: str) -> Play:
    """SIGSTOP one rank for good."""

    def play(scene: Scene) -> Seen:
        scene.overrides = [f"run.rank_timeout_s={RANK_LIMIT_S:g}"]
        launch = scene.job()
        launch.halt(edge, rank=number)
        rank = launch.rank(number)
        scene.strike(launch)
        send(rank, signal.SIGSTOP)
        launch.go(number)
        return scene.end(launch, 90.0)

    return play


def stop_shortly(scene: Scene) -> Seen:
    """SIGSTOP and, after some seconds, SIGCONT: a machine that swapped."""
    scene.overrides = [f"run.rank_timeout_s={RANK_LIMIT_S:g}"]
    launch = scene.job()
    launch.halt("before score", rank=1)
    rank, done = launch.rank(1), scene.steps()
    scene.strike(launch)
    send(rank, signal.SIGSTOP)
    launch.go(1)
    time.sleep(RANK_LIMIT_S / 4)
    send(rank, signal.SIGCONT)
    return scene.goes_on(launch, lambda: scene.steps() > done)


def _row(name: str, done: str, play: Play, line: str, *, representative: bool = False) -> Fault:
    return Fault(
        id=f"stop-{name}",
        group="stop",
        done=done,
        wanted="within run.rank_timeout_s one line that names the rank; nothing left; the same command goes on",
        play=play,
        code=(1, LOST),
        line=line,
        limit_s=75.0,
        chain="stops",
        representative=representative,
    )


FAULTS = [
    _row("rank-1", "SIGSTOP rank 1 in a step", stop_rank(1, "before score"), "rank 1", representative=True),
    _row("rank-0", "SIGSTOP rank 0 in a step", stop_rank(0, "before forward and backward"), "rank 0"),
    _row("rank-0-start", "SIGSTOP rank 0 before its job starts", stop_rank(0, "before start"), "rank 0"),
    Fault(
        id="stop-shortly",
        group="stop",
        done=f"SIGSTOP rank 1 for {RANK_LIMIT_S / 4:g} s, then SIGCONT",
        wanted="the run goes on as if nothing had happened",
        play=stop_shortly,
        code=(None,),  # type: ignore[arg-type]
        limit_s=60.0,
        chain="stops",
    ),
]
