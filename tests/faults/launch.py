"""One command as a user starts it: its processes, its output with times, and the positions of its ranks.

`verdict` judges whether the outcome is right. Invariants: the command runs the code of this repository. Signals go only
to descendants of a process that was started here. `clear` leaves none of them running.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.e2e.jobs import REPOSITORY, environment
from tests.faults.phases import PHASES
from tests.faults.soak_readings import SharedMemory

STARTUP = Path(__file__).with_name("startup")
POLL_S = 0.1
WATCH_S = 0.25
GO_S = 10.0
"""Longest wait until a rank that may go on has noticed. One that was killed never does."""
LIMIT_S = 240.0
"""Longest wait for an expected event. It only ends a hang and does not judge a slow machine."""


class TooLateError(Exception):
    """An expected event did not happen in time."""


@dataclass(frozen=True)
class Line:
    """One line of output, and the time of its arrival in seconds since the start."""

    at: float
    text: str


class Launch:
    """A running command. `notes` is the folder that its processes share with the suite (`startup/sitecustomize`)."""

    def __init__(
        self, command: list[str], notes: Path, *, extra: Mapping[str, str] | None = None, cwd: Path = REPOSITORY
    ) -> None:
        notes.mkdir(parents=True, exist_ok=True)
        for old in notes.iterdir():
            old.unlink()
        (notes / "phases.json").write_text(json.dumps(PHASES))
        notes.chmod(0o755)
        self.command = command
        self.notes = notes
        self.lines: list[Line] = []
        self.begun = time.monotonic()
        self.marks = SharedMemory()
        self._seen: dict[tuple[int, float], psutil.Process] = {}
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=job_environment(notes, extra or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._over = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._reader.start()
        self._watcher.start()

    # output

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.begun

    def text(self, since: float = 0.0) -> str:
        """The output from second `since` on."""
        return "\n".join(line.text for line in list(self.lines) if line.at >= since)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            self.lines.append(Line(self.seconds, raw.decode(errors="replace").rstrip("\r\n")))

    # processes

    def _watch(self) -> None:
        while not self._over.wait(WATCH_S):
            self.look()

    def look(self) -> None:
        """Record the processes that run now, and their files in shared memory."""
        with contextlib.suppress(psutil.Error):
            family = [psutil.Process(self.process.pid)]
            family += family[0].children(recursive=True)
            for process in family:
                with contextlib.suppress(psutil.Error):
                    self._seen.setdefault((process.pid, process.create_time()), process)
        for known in list(self._seen.values()):  # processes whose parents have ended
            with contextlib.suppress(psutil.Error):
                for child in known.children(recursive=True):
                    self._seen.setdefault((child.pid, child.create_time()), child)
        with contextlib.suppress(OSError):
            self.marks.read(0, self)  # type: ignore[arg-type]

    def pids(self) -> set[int]:
        """PIDs of all processes that were ever seen."""
        return {pid for pid, _ in list(self._seen)}

    def members(self) -> list[psutil.Process]:
        """Running processes of this launch, whatever their current parent."""
        return [process for process in list(self._seen.values()) if lives(process)]

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        found = [process for process in self.members() if _variable(process, "RANK") == str(number)]
        ranks = [process for process in found if _is_rank(process)]
        if not ranks:
            raise TooLateError(f"there is no rank {number}")
        return ranks[0]

    def server(self, run_dir: Path, name: str = "rollout") -> psutil.Process:
        """The process of a server that the launch started."""
        return psutil.Process(int(json.loads((run_dir / "logs" / f"{name}.server.json").read_text())["pid"]))

    # positions of the ranks

    def point(self, rank: int) -> str:
        """The edge that a rank passed last. Empty if it passed none."""
        try:
            return (self.notes / f"point.{rank}").read_text().strip()
        except FileNotFoundError:
            return ""

    def arm(self, edge: str, *, rank: int = 0, then: str = "wait", nth: int = 1) -> None:
        """Make a rank act (`startup/sitecustomize`) when it reaches `edge` for the `nth` time from now on."""
        if (self.notes / f"reached.{rank}").exists():
            gone = time.monotonic() + GO_S  # a rank that was told to go on must not miss it
            while (self.notes / f"go.{rank}").exists() and self.process.poll() is None and time.monotonic() < gone:
                time.sleep(POLL_S / 10)
        for name in ("reached", "go"):
            (self.notes / f"{name}.{rank}").unlink(missing_ok=True)
        fresh = self.notes / f"fresh.{rank}"
        fresh.write_text(json.dumps({"edge": edge, "then": then, "nth": nth}))
        fresh.replace(self.notes / f"wanted.{rank}")

    def reach(self, rank: int = 0) -> None:
        """Wait until the rank reaches its armed edge. That time is the time of the fault."""
        self.wait((self.notes / f"reached.{rank}").exists, f"rank {rank} at its point")

    def halt(self, edge: str, *, rank: int = 0) -> None:
        """Make a rank wait at the next `edge`, and wait until it is there."""
        self.arm(edge, rank=rank)
        self.reach(rank)

    def go(self, rank: int = 0) -> None:
        """Let a waiting rank continue."""
        (self.notes / f"go.{rank}").touch()

    def wait(self, condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
        """Wait for `condition`. Raises TooLateError if the launch ends or the time is up before that."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if self.process.poll() is not None and not condition():
                raise TooLateError(f"{what}: the command ended before with {self.process.returncode}: {self.tail()}")
            if time.monotonic() > deadline:
                raise TooLateError(f"{what}: not within {limit_s:g} s: {self.tail()}")
            time.sleep(POLL_S / 4)

    def wait_for_line(self, text: str, *, since: float = 0.0, limit_s: float = LIMIT_S) -> None:
        """Wait for a line with `text`."""
        self.wait(lambda: text in self.text(since), f"the line {text!r}", limit_s)

    def tail(self) -> str:
        """The last lines, as one."""
        return " / ".join(line.text for line in self.lines[-4:])[-600:]

    # end

    def ended(self, limit_s: float = LIMIT_S) -> bool:
        """Wait for the end of the command and of all its processes. Returns whether they ended in time."""
        deadline = time.monotonic() + limit_s
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=limit_s)
        self.look()
        _, alive = psutil.wait_procs(self.members(), timeout=max(0.0, min(deadline - time.monotonic(), 30.0)))
        return self.process.poll() is not None and not [process for process in alive if lives(process)]

    def left(self) -> list[str]:
        """The processes that still run, in words."""
        return [_describe(process) for process in self.members()]

    def clear(self) -> None:
        """Kill all processes that still run, and stop watching."""
        self._over.set()
        self._watcher.join()
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()
        psutil.wait_procs(self.members(), timeout=30)
        self._reader.join(timeout=10)
        if self.process.stdout is not None and not self._reader.is_alive():
            self.process.stdout.close()


def tropd(*arguments: object) -> list[str]:
    """The command line of a `tropd` subcommand."""
    return [sys.executable, "-m", "tropd_mcore.cli.main", *(str(argument) for argument in arguments)]


def job_environment(notes: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a user on a CPU host, with the suite's folder. `extra` overrides it."""
    found = environment(CUDA_VISIBLE_DEVICES="", TROPD_FAULTS=str(notes))
    found["PYTHONPATH"] = f"{STARTUP}{os.pathsep}{REPOSITORY}"
    return found | dict(extra)


def check_code(notes: Path) -> None:
    """Check that the commands import the package of this repository. Raises RuntimeError if they would not."""
    notes.mkdir(parents=True, exist_ok=True)
    program = "import tropd_mcore; print(tropd_mcore.__file__)"
    command = [sys.executable, "-c", program]
    found = subprocess.run(
        command, cwd="/", env=job_environment(notes, {}), check=True, capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).resolve().is_relative_to(REPOSITORY):
        raise RuntimeError(f"the commands would run {found}; expected the package below {REPOSITORY}")


def lives(process: psutil.Process) -> bool:
    """Whether the process runs, and is neither a zombie nor another process with its pid."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to one process. Does nothing if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except (psutil.Error, OSError):
        return None


def _is_rank(process: psutil.Process) -> bool:
    """Whether it is the process of a rank itself, not one that the rank started."""
    try:
        parent = process.parent()
        command = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "tropd_mcore" in command and "serving" not in command and _variable_of(parent, "RANK") is None


def _variable_of(process: psutil.Process | None, name: str) -> str | None:
    return None if process is None else _variable(process, name)


def _describe(process: psutil.Process) -> str:
    try:
        return f"pid {process.pid} ({process.status()}): {' '.join(process.cmdline())[-80:]}"
    except psutil.Error:
        return f"pid {process.pid}"
