"""One run with faults: its folder, its repeated command, and the observations at each fault.

This module does not judge (`verdict` does). Invariant: the clock of a fault starts at `strike` and ends with the
command or with the next step, so that start-up never counts as silence of a fault.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.jobs import metrics
from tests.faults.launch import LIMIT_S, Launch, TooLateError
from tests.faults.stage import STEPS, Reference, Stage, step_problems, train
from tests.faults.verdict import Seen

OPEN: list[Scene] = []
"""Scenes that run now, to clear them if the suite is aborted."""


@dataclass
class Scene:
    """A run directory with the command that makes it."""

    stage: Stage
    folder: Path
    config: Path = field(init=False)
    overrides: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    run_dir: Path = field(init=False)
    current: Launch | None = None
    last: Launch | None = None
    struck: float = 0.0
    launches: list[Launch] = field(default_factory=list)
    cleanup: ExitStack = field(default_factory=ExitStack)
    """Resources that end with the scene: proxies, mounted disks."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Values that the faults of a chain pass to each other."""

    def __post_init__(self) -> None:
        self.config = self.stage.replay_config
        self.run_dir = self.folder / "run"

    def command(self, *more: str) -> list[str]:
        """The command of the run."""
        return train(self.config, f"run.dir={self.run_dir}", *self.overrides, *more)

    def job(self, *more: str, extra: Mapping[str, str] | None = None) -> Launch:
        """The running launch of the run, or a new one."""
        if self.current is None or self.current.process.poll() is not None:
            self.current = self.start(self.command(*more), extra=extra)
        return self.current

    def start(self, command: Sequence[str], *, extra: Mapping[str, str] | None = None) -> Launch:
        """Start any command. The scene kills its remaining processes at its end."""
        notes = self.folder / f"notes-{len(self.launches)}"
        launch = Launch(list(command), notes, extra=self.environment | dict(extra or {}))
        self.launches.append(launch)
        self.last = launch
        return launch

    def strike(self, launch: Launch) -> None:
        """Record that the fault happens now."""
        self.struck = launch.seconds

    def end(self, launch: Launch, limit_s: float = LIMIT_S) -> Seen:
        """Wait for the end of the launch and return the observations since the fault."""
        ended = launch.ended(limit_s)
        until = launch.seconds
        if launch is self.current:
            self.current = None
        return self._seen(launch, until, hung=not ended, code=launch.process.poll())

    def goes_on(self, launch: Launch, done: Callable[[], bool], limit_s: float = LIMIT_S) -> Seen:
        """Wait until the run has continued after the fault (`done`). Returns the observations until then."""
        try:
            launch.wait(done, "the run to go on", limit_s)
        except TooLateError as error:
            seen = self.end(launch, 5.0) if launch.process.poll() is not None else self._seen(launch, hung=True)
            seen.lost.append(str(error)[:200])
            return seen
        return self._seen(launch, launch.seconds, code=None)

    def _seen(self, launch: Launch, until: float | None = None, *, hung: bool = False, code: int | None = None) -> Seen:
        until = launch.seconds if until is None else until
        times = [self.struck, *(line.at for line in list(launch.lines) if self.struck <= line.at <= until), until]
        silence = max(later - earlier for earlier, later in itertools.pairwise(times))
        time.sleep(0.2)  # the reader may lag by one line
        return Seen(
            code=code,
            output=launch.text(self.struck),
            seconds=until - self.struck,
            silence=silence,
            hung=hung,
            left_running=launch.left() if code is not None or hung else [],
        )

    def play_to_the_end(self, command: Sequence[str], *, extra: Mapping[str, str] | None = None) -> Seen:
        """A command whose inputs contain the fault, from its start to its end."""
        launch = self.start(command, extra=extra)
        self.struck = 0.0
        return self.end(launch)

    def steps(self) -> int:
        """Lines of the metrics so far."""
        with contextlib.suppress(ValueError):
            return len(metrics(self.run_dir))
        return -1

    def finish(self, *, limit_s: float = LIMIT_S) -> list[str]:
        """Repeat the command until the run is complete. Returns the problems of its result, in words."""
        launch = self.job()
        ended = launch.ended(limit_s)
        code, self.current = launch.process.poll(), None
        problems = []
        if not ended or code != 0:
            problems.append(f"the same command again ended with {code}: {launch.tail()}")
        problems += [f"left in /dev/shm after the next launch: {name}" for name in self.left_in_shm()]
        if self.config == self.stage.replay_config:
            problems += self.stage.reference().differences(Reference.of(self.run_dir))
        else:
            problems += step_problems(metrics(self.run_dir), self.steps_wanted())
        if not problems and self.shared.get("compare"):
            problems += self.replay_problems()
        return problems

    def replay_problems(self) -> list[str]:
        """The differences between the run and an undisturbed replay of its rollouts."""
        with scene(self.stage, f"{self.folder.name}-replay") as again:
            again.config = self.config
            again.overrides = [*self.overrides, f"run.replay={self.run_dir}"]
            launch = again.job()
            if not launch.ended(600.0) or launch.process.poll() != 0:
                return [f"the replay ended with {launch.process.poll()}: {launch.tail()}"]
            return Reference.of(again.run_dir).differences(Reference.of(self.run_dir))

    def steps_wanted(self) -> int:
        """Steps of the whole run."""
        named = [text for text in self.overrides if text.startswith("run.steps=")]
        return int(named[-1].partition("=")[2]) if named else STEPS if self.config == self.stage.replay_config else 6

    def left_in_shm(self) -> list[str]:
        """Names in /dev/shm that remain from all launches so far."""
        return sorted({name for launch in self.launches for name in launch.marks.left()})

    def close(self) -> None:
        """Kill all processes that still run, and free disk space."""
        for launch in self.launches:
            launch.clear()
        for name in self.left_in_shm():  # reported already, and must not remain
            (Path("/dev/shm") / name).unlink(missing_ok=True)
        self.cleanup.close()


@contextmanager
def scene(stage: Stage, name: str) -> Iterator[Scene]:
    """A scene that leaves no process or file behind."""
    made = Scene(stage, stage.place(name))
    OPEN.append(made)
    try:
        yield made
    finally:
        OPEN.remove(made)
        made.close()


def end_with_the_suite(stage: Stage) -> None:
    """Make SIGTERM and SIGINT end this process and everything that it started and mounted. Call in the main thread."""

    def end(number: int, _frame: object) -> None:
        for made in list(OPEN):
            with contextlib.suppress(Exception):
                made.close()
        stage.close()
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)


def copied(source: Path, target: Path) -> Path:
    """A copy of a folder, to damage."""
    shutil.copytree(source, target)
    return target
