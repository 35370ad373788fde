"""A fault of the suite, the observations when it was played, and the verdict that follows from both.

This module does not play faults (`scene` and the `rows_*` files do). Invariant: no verdict is written by hand. It is
computed from the observations, only by the rules of `judge`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.scene import Scene

OK, WEAK, MISS = "ok", "WEAK", "MISS"
SILENCE_S = 30.0
"""Longest time without a line while something waits."""
GROUPS = ("kill", "stop", "signal", "disk", "server", "teacher", "checkpoint", "file", "message", "security")
FLEET = "fleet"
"""Group of the faults of several rollout servers, which have a result of their own."""
CAUSE = re.compile(r"error|interrupted|stopped|SIGTERM|SIGINT|usage:|FAIL|refused", re.IGNORECASE)
"""Texts in a line that says why something ended."""
NOISE = re.compile(
    r"Traceback \(most recent call last\)|^[WE]\d{4} .*(Sending process|failed \(exitcode|closing signal)"
)
"""Lines that should not follow a message to the user."""


@dataclass(frozen=True)
class Fault:
    """One row: the fault, and the result that a user must get."""

    id: str
    group: str
    done: str
    """What happens to the run, for the table."""
    wanted: str
    """The result that a user must get, for the table."""
    play: Callable[[Scene], Seen]
    code: tuple[int, ...] = (2,)
    """Correct exit codes."""
    line: str = ""
    """Regular expression of the one line that a user must get. Empty if no process is left to print it."""
    limit_s: float = 120.0
    """Longest time from the fault to the end, or to the next step."""
    chain: str = ""
    """Faults of one chain are played one after the other in one run. Empty = its own run."""
    shared: bool = False
    """Whether it uses the shared servers, which serve one job at a time."""
    noise: bool = False
    """Whether a traceback is correct, as for a bug in our code."""
    representative: bool = False
    """Whether it belongs to the part that CI plays."""


@dataclass
class Seen:
    """The observed outcome of a fault."""

    code: int | None = None
    """Exit code of the command. None if it still runs, as expected or not (`hung`)."""
    output: str = ""
    """The output since the fault."""
    seconds: float = 0.0
    """Seconds from the fault to the end, or to the next step."""
    silence: float = 0.0
    """Longest time without a line meanwhile."""
    hung: bool = False
    left_running: list[str] = field(default_factory=list)
    left_in_shm: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Work that is lost or wrong: missing or repeated steps, numbers that differ from those without the fault, accepted
    lies."""
    weak: list[str] = field(default_factory=list)
    """Outcomes that are safe, but costly or unclear."""


@dataclass(frozen=True)
class Verdict:
    """The content of a row of the table."""

    verdict: str
    reasons: list[str]
    counted: dict[str, int]
    """lost, silent, hung, left running, left in shared memory: 0 or 1 each."""
    line: str
    """The line that the user got."""


def judge(fault: Fault, seen: Seen) -> Verdict:
    """The verdict on the observations."""
    lost, weak = list(seen.lost), list(seen.weak)
    failed = seen.code not in (0, None)
    if not seen.hung and seen.code not in fault.code:
        text = f"exit code {seen.code}; expected {' or '.join(map(str, fault.code))}"
        (lost if seen.code == 0 else weak).append(text)
    line = told(fault, seen.output)
    if fault.line and re.search(fault.line, line) is None:
        weak.append(f"no line like {fault.line!r}")
    if not fault.noise and (found := next((text for text in seen.output.splitlines() if NOISE.search(text)), None)):
        weak.append(f"noise: {found[:80]}")
    silent = []
    if seen.silence > SILENCE_S:
        silent.append(f"silent for {seen.silence:.0f} s")
    if fault.line and failed and not CAUSE.search(seen.output):
        silent.append("no line about the cause")
    hung = seen.hung or seen.seconds > fault.limit_s
    reasons = [*lost, *silent, *([f"hung: {seen.seconds:.0f} s; at most {fault.limit_s:g} s"] if hung else [])]
    reasons += [f"left running: {text}" for text in seen.left_running]
    reasons += [f"left in /dev/shm: {text}" for text in seen.left_in_shm]
    counted = {
        "lost": int(bool(lost)),
        "silent": int(bool(silent)),
        "hung": int(hung),
        "left_running": int(bool(seen.left_running)),
        "left_in_shm": int(bool(seen.left_in_shm)),
    }
    verdict = MISS if any(counted.values()) else WEAK if weak else OK
    return Verdict(verdict, [*reasons, *weak], counted, line)


def told(fault: Fault, output: str) -> str:
    """The line that answers the fault: the last that matches the expected one, else the last error, else the last line.

    If no line is expected and there is no error, there is no line to show.
    """
    lines = [text.strip() for text in output.splitlines() if text.strip()]
    fitting = [text for text in lines if fault.line and re.search(fault.line, text)]
    errors = [text for text in lines if re.search(r"^error|FAIL|interrupted", text)]
    others = lines if fault.line else []
    return (fitting or errors or others or [""])[-1]
