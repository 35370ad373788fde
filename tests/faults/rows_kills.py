"""Faults: processes that are killed at a named moment of a step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable

import psutil

from tests.faults.launch import Launch, TooLateError, send
from tests.faults.scene import Scene
from tests.faults.verdict import Fault, Seen

Play = Callable[[Scene], Seen]
CHAIN = "kills"
ENDS = "rank {} ended|lost|gone|died|killed|signal"
"""A rank that is killed is named by the launcher, or by the rank that waits for it."""


def at(edge: str, *victims: int, waits: int = 0) -> Play:
    """SIGKILL the ranks `victims` while rank `waits` is at `edge`."""

    def play(scene: Scene) -> Seen:
        launch = scene.job()
        launch.halt(edge, rank=waits)
        ranks = [launch.rank(number) for number in victims]
        scene.strike(launch)
        for rank in ranks:
            send(rank, signal.SIGKILL)
        launch.go(waits)
        return scene.end(launch)

    return play


def kill_launcher(edge: str, start: Callable[[Scene], Launch] = Scene.job) -> Play:
    """SIGKILL the launcher that `start` started, while rank 0 is at `edge`. Ranks and servers get no signal."""

    def play(scene: Scene) -> Seen:
        launch = start(scene)
        launch.halt(edge)
        launch.look()
        scene.strike(launch)
        launch.process.kill()
        launch.go()
        return scene.end(launch, 60.0)

    return play


def kill_launcher_early(scene: Scene) -> Seen:
    """SIGKILL the launcher while the ranks import."""
    launch = scene.job()
    launch.wait(lambda: _has_rank(launch), "ranks")
    launch.look()
    scene.strike(launch)
    launch.process.kill()
    return scene.end(launch, 60.0)


def _has_rank(launch: Launch) -> bool:
    with contextlib.suppress(TooLateError, psutil.Error):
        launch.rank(1)
        return True
    return False


def bug(scene: Scene) -> Seen:
    """An exception other than TropdError on rank 0."""
    launch = scene.job()
    launch.arm("before optimizer", then="raise")
    launch.reach()
    scene.strike(launch)
    return scene.end(launch)


def _row(name: str, done: str, play: Play, *, representative: bool = False) -> Fault:
    return Fault(
        id=f"kill-{name}",
        group="kill",
        done=f"SIGKILL {done}",
        wanted="the other processes end at once; the same command goes on; equal bit for bit to the run without it",
        play=play,
        code=(1, 2, 137),
        line="rank|signal|SIGKILL|killed",
        limit_s=60.0,
        chain=CHAIN,
        representative=representative,
    )


FAULTS = [
    _row("start", "rank 1 before its job starts", at("before start", 1, waits=1)),
    _row("load", "rank 0 while it loads the student", at("before load model", 0)),
    _row("read-rollouts", "rank 0 before it has the rollouts", at("before read rollouts", 0)),
    _row("after-rollouts", "rank 0 after it has the rollouts", at("after read rollouts", 0), representative=True),
    _row("before-scores", "rank 1 before the teacher scores", at("before score", 1, waits=1)),
    _row("after-scores", "rank 0 after the teacher scored", at("after score", 0)),
    _row("before-backward", "rank 1 before forward and backward", at("before forward and backward", 1, waits=1)),
    _row("after-backward", "rank 0 after forward and backward", at("after forward and backward", 0)),
    _row("before-optimizer", "rank 1 before the optimizer step", at("before optimizer", 1, waits=1)),
    _row("after-optimizer", "rank 0 after the optimizer step", at("after optimizer", 0)),
    _row("before-metrics", "rank 0 before the metrics line", at("before metrics", 0)),
    _row("after-metrics", "rank 0 after the metrics line", at("after metrics", 0)),
    _row("checkpoint", "rank 1 at the beginning of a checkpoint", at("before checkpoint", 1, waits=1)),
    _row("checkpoint-info", "rank 0 after the tensors, before the JSON", at("before checkpoint info", 0)),
    _row("checkpoint-renamed", "rank 0 after the checkpoint has its name", at("after checkpoint info", 0)),
    _row("prune", "rank 0 before old checkpoints go", at("before prune", 0)),
    _row("both", "both ranks in one moment", at("before forward and backward", 0, 1)),
    Fault(
        id="kill-launcher",
        group="kill",
        done="SIGKILL the launcher in a step (OOM killer, `kill -9`)",
        wanted="both ranks end; the lock is free; the same command goes on, equal bit for bit",
        play=kill_launcher("before forward and backward"),
        code=(-9,),
        limit_s=30.0,
        chain=CHAIN,
        representative=True,
    ),
    Fault(
        id="kill-launcher-early",
        group="kill",
        done="SIGKILL the launcher while the ranks import",
        wanted="both ranks end; the same command goes on",
        play=kill_launcher_early,
        code=(-9,),
        limit_s=60.0,
        chain=CHAIN,
    ),
    Fault(
        id="kill-bug",
        group="kill",
        done="an exception of our own in rank 0's optimizer step",
        wanted="exit code 1 with the traceback, since it is a bug; the other rank ends; the same command goes on",
        play=bug,
        code=(1,),
        line="RuntimeError: a fault that the suite planted",
        limit_s=60.0,
        chain=CHAIN,
        noise=True,
    ),
    _row("export", "rank 0 before the export has its name", at("before publish export", 0)),
    _row("export-rank-1", "rank 1 before the export", at("before export", 1, waits=1)),
]  # fmt: skip
