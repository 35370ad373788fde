"""Run pytest processes to their end or deadline, with regular output, and read the plugin's result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.mutation import copies

HEARTBEAT_S = 25.0
POLL_S = 0.1
PASSED, NO_TESTS = 0, 5
"""Exit codes of pytest."""
REFUSED = (3, 4, 97)
"""Exit codes of an internal error, of wrong arguments and of startup/sitecustomize.py. No test was run."""


Item = TypeVar("Item")
Result = TypeVar("Result")

_STOP = threading.Event()
"""Set when the run is aborted, so that no process outlives it."""


def in_parallel(work: Callable[[Path, Item], Result], items: Sequence[Item], spare: Sequence[Path]) -> list[Result]:
    """Call `work(copy, item)` for each item, at most one at a time per copy. Returns the results in order.

    The first error, or an interrupt, ends all running work and is raised.
    """
    free = list(spare)

    def one(item: Item) -> Result:
        copy = free.pop()
        try:
            return work(copy, item)
        finally:
            free.append(copy)

    with ThreadPoolExecutor(len(spare)) as pool:
        futures = [pool.submit(one, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            _STOP.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass(frozen=True)
class Ended:
    """How a pytest process ended."""

    code: int
    """Exit code. Negative for a signal."""
    late: bool
    """Whether it was killed at its deadline."""
    seconds: float
    output: str
    report: dict[str, Any] = field(default_factory=dict)
    """The plugin's output. Empty if it could not write."""

    def require_sound(self) -> None:
        """Raise RuntimeError if the outcome says nothing about the tests."""
        killed_by_others = self.code == -signal.SIGKILL and not self.late
        if self.code in REFUSED or killed_by_others or "WRONG SOURCES" in self.output:
            raise RuntimeError(f"pytest ended with code {self.code}:\n{self.output[-4000:]}")


def run_pytest(copy: Path, arguments: list[str], *, name: str, deadline_s: float, **environment: str) -> Ended:
    """Run pytest in the copy, in a process group that ends with it. `name` appears in the heartbeat."""
    scratch = copy.with_name(f"{copy.name}-scratch")
    scratch.mkdir(exist_ok=True)
    report, log = scratch / "report.json", scratch / "output.txt"
    report.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            copies.pytest_command(*arguments),
            cwd=copy,
            env=copies.environment(copy, MUTATION_REPORT=str(report), **environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            late = not _wait(process, name, start, deadline_s)
        finally:
            _end_group(process)
    return Ended(
        process.returncode,
        late,
        time.monotonic() - start,
        log.read_text(encoding="utf-8", errors="replace"),
        json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {},
    )


def _wait(process: subprocess.Popen[bytes], name: str, start: float, deadline_s: float) -> bool:
    """Whether the process ended by itself before the deadline."""
    said = start
    while process.poll() is None:
        if _STOP.is_set():
            raise InterruptedError(f"{name}: the run was given up")
        now = time.monotonic()
        if now - start > deadline_s:
            return False
        if now - said > HEARTBEAT_S:
            print(f"    {name}: {now - start:.0f} s so far\n", end="", flush=True)
            said = now
        time.sleep(POLL_S)
    return True


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End all remaining processes of the group that the process leads, including hanging ranks."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
