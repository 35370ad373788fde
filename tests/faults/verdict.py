"""A fault of the suite, what was seen when it was played, and the verdict that follows from the two.

Not for playing it (`scene`, the `rows_*` files). Invariant: nobody writes a verdict by hand; it is computed from what
was seen, by the rules of `judge` alone.
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
CAUSE = re.compile(r"error|interrupted|stopped|SIGTERM|SIGINT|usage:|FAIL|refused", re.IGNORECASE)
"""What a line has that tells why something ended."""
NOISE = re.compile(
    r"Traceback \(most recent call last\)|^[WE]\d{4} .*(Sending process|failed \(exitcode|closing signal)"
)
"""Lines that a user should not have to read after a message."""


@dataclass(frozen=True)
class Fault:
    """One row: what is done, and what a user must get."""

    id: str
    group: str
    done: str
    """What happens to the run, for the table."""
    wanted: str
    """What a user must get, for the table."""
    play: Callable[[Scene], Seen]
    code: tuple[int, ...] = (2,)
    """Exit codes that are right."""
    line: str = ""
    """Regular expression of the one line that a user must get; empty where nobody is left who could say it."""
    limit_s: float = 120.0
    """Longest time from the fault to the end, or to the step after it."""
    chain: str = ""
    """Faults of one chain are played one after the other in one run; empty = a run of its own."""
    shared: bool = False
    """Whether it uses the shared servers, which take one job at a time."""
    noise: bool = False
    """Whether a traceback is right, as it is for a bug of our own."""
    representative: bool = False
    """Whether it belongs to the part that CI plays."""


@dataclass
class Seen:
    """What became of a fault."""

    code: int | None = None
    """Exit code of the command; None where it still runs, as it should or not (`hung`)."""
    output: str = ""
    """What was printed since the fault."""
    seconds: float = 0.0
    """From the fault to the end, or to the step after it."""
    silence: float = 0.0
    """Longest time without a line meanwhile."""
    hung: bool = False
    left_running: list[str] = field(default_factory=list)
    left_in_shm: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Work that is gone or wrong: steps that are missing or twice, other numbers than without the fault, a lie that was
    taken."""
    weak: list[str] = field(default_factory=list)
    """What is safe, but costly or unclear."""


@dataclass(frozen=True)
class Verdict:
    """What a row of the table says."""

    verdict: str
    reasons: list[str]
    counted: dict[str, int]
    """lost, silent, hung, left running, left in shared memory: 0 or 1 each."""
    line: str
    """The line that the user got."""


def judge(fault: Fault, seen: Seen) -> Verdict:
    """The verdict about what was seen."""
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
    """The line that answers the fault: the last that fits what is wanted, else the last error, else the last line.

    Where none is wanted and there is no error, there is nothing to show.
    """
    lines = [text.strip() for text in output.splitlines() if text.strip()]
    fitting = [text for text in lines if fault.line and re.search(fault.line, text)]
    errors = [text for text in lines if re.search(r"^error|FAIL|interrupted", text)]
    others = lines if fault.line else []
    return (fitting or errors or others or [""])[-1]
