"""Progress reports of everything that takes long: what runs, how far it is, how much time is left.

On a terminal this is one bar, in a log one plain line every few seconds. This module does not handle the metrics of a
step (see `monitor`) and does not decide where lines go (see `logs`, which also detects terminals). Invariants: work
inside `progress` is never silent for longer than `report_every` allows. Work that ends within 5 s reports nothing. If
pieces of work are nested, only the innermost one reports. The reporting thread ends with the outermost block in any
case.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

Item = TypeVar("Item")

EVERY_S = 10.0
"""Default seconds between two lines in a log; `report_every` changes it (monitor.progress_every_s)."""
FIRST_S = 5.0
"""Work is reported only after it has lasted this long."""
STALLED_S = 30.0
"""Seconds without progress after which the line says "nothing new for ..."."""
TICK_S = 0.5
"""Seconds between two checks of the reporting thread, and between two updates of the bar."""


@dataclass(eq=False)
class Progress:
    """The progress of one piece of work. `total` is None if it is unknown.

    `amount` is a second count whose rate is shown, in `amount_unit` (tokens, bytes), for example "412 tok/s".
    """

    what: str
    total: int | None = None
    unit: str = ""
    amount_unit: str = ""
    done: int = 0
    amount: float = 0.0
    note: str = ""
    begun: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    """Time of the last progress (monotonic seconds)."""

    def advance(self, count: int = 1, note: str | None = None, *, amount: float = 0.0) -> None:
        """Record that `count` more units are done. `note` is shown beside them and replaces the previous note."""
        self.done += count
        self.amount += amount
        self.note = self.note if note is None else note
        self.moved = time.monotonic()
        tick()

    def rate(self, now: float) -> str:
        """Return the rate of `amount`, for example "412 tok/s"; empty if nothing is counted."""
        seconds = now - self.begun
        if not self.amount_unit or not self.amount or seconds <= 0:
            return ""
        return f"{_amount(self.amount / seconds)}{self.amount_unit}/s"

    def left_s(self, now: float) -> float | None:
        """Return the remaining seconds at the rate so far; None if it is unknown."""
        if not self.total or not self.done:
            return None
        return (now - self.begun) / self.done * max(self.total - self.done, 0)

    def line(self, now: float) -> str:
        """Return everything that is known as one line for a log."""
        parts = [self._how_far(now), self.rate(now), self.note]
        if now - self.moved >= STALLED_S and (self.total is not None or self.done):
            parts.append(f"nothing new for {duration(now - self.moved)}")
        else:
            left = self.left_s(now)
            parts.append("" if left is None else f"{duration(left)} left")
        return f"{self.what}: {', '.join(part for part in parts if part)}"

    def _how_far(self, now: float) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if self.total is not None:
            return f"{self.done} of {self.total}{unit}"
        so_far = f"{duration(now - self.begun)} so far"
        return f"{self.done}{unit}, {so_far}" if self.done else so_far


class Display(Protocol):
    """An object that draws the bar of a terminal (`logs`)."""

    def draw(self, state: Progress, now: float) -> None:
        """Show `state` in place of the current bar."""

    def clear(self, state: Progress) -> None:
        """Remove the bar if it shows `state`."""


def duration(seconds: float) -> str:
    """Return `seconds` in a readable unit: "40 s", "12 min", "3.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def _amount(value: float) -> str:
    """A short number with the prefix of its unit: "0.82 ", "412 ", "51.3 k", "812.4 M"."""
    if value < 1e4:
        return f"{value:.0f} " if value >= 100 else f"{value:.3g} "
    return f"{value / 1e3:.1f} k" if value < 1e6 else f"{value / 1e6:.1f} M"


def activity() -> str:
    """Return what this process is doing, for messages about it; empty if nothing long runs.

    Takes no lock, because the watchdog of a rank calls it, and a blocked terminal must not block the watchdog.
    """
    top = _stack[-1:]
    return top[0].what if top else ""


def ticks() -> int:
    """Return a number that grows whenever this process makes progress."""
    return _ticks


def tick() -> None:
    """Record that this process made progress with work that is not counted."""
    global _ticks
    _ticks += 1


def report_every(seconds: float) -> None:
    """Set the largest number of seconds between two lines in a log (monitor.progress_every_s)."""
    global _every_s
    _every_s = seconds


def report_on(display: Display | None) -> None:
    """Draw a bar on `display` from now on, in place of log lines; None: log lines."""
    global _display
    _display = display


@contextmanager
def progress(
    log: logging.Logger,
    what: str,
    *,
    total: int | None = None,
    unit: str = "",
    amount_unit: str = "",
) -> Iterator[Progress]:
    """Report `what` until the block ends. The block reports its progress with `advance`.

    `total` is a number of `unit`s. Without it, the line shows the time so far. See `Progress` for `amount_unit`.
    """
    state = Progress(what, total, unit, amount_unit)
    _enter(state, log)
    try:
        yield state
    finally:
        _leave(state)


def counted(items: Iterable[Item], state: Progress) -> Iterator[Item]:
    """Yield the items and count each one when the next is requested."""
    for item in items:
        yield item
        state.advance()


def heard() -> None:
    """Record that a log line was just written, so that the next progress line can wait."""
    global _said
    _said = time.monotonic()


_lock = threading.Lock()
_stack: list[Progress] = []
_ticks = 0
_every_s = EVERY_S
_said = 0.0
_display: Display | None = None
_reporter: _Reporter | None = None


def _enter(state: Progress, log: logging.Logger) -> None:
    global _reporter, _ticks
    with _lock:
        _stack.append(state)
        _ticks += 1
        if _reporter is None:
            _reporter = _Reporter(log)
            _reporter.start()
        _reporter.logs[id(state)] = log


def _leave(state: Progress) -> None:
    global _reporter, _ticks
    ended = None
    with _lock:
        _stack.remove(state)
        _ticks += 1
        assert _reporter is not None
        _reporter.logs.pop(id(state), None)
        if not _stack:
            ended, _reporter = _reporter, None
    if ended is not None:
        ended.end()
    if _display is not None:
        _display.clear(state)


class _Reporter(threading.Thread):
    """A thread that reports the innermost work that has lasted long enough, until the stack is empty."""

    def __init__(self, log: logging.Logger) -> None:
        super().__init__(name="progress", daemon=True)
        self.logs: dict[int, logging.Logger] = {}
        self._over = threading.Event()
        heard()

    def run(self) -> None:
        while not self._over.wait(min(TICK_S, _every_s)):
            self._look(time.monotonic())

    def end(self) -> None:
        self._over.set()
        if self is not threading.current_thread():
            self.join()

    def _look(self, now: float) -> None:
        with _lock:
            speaker = next((state for state in reversed(_stack) if now - state.begun >= min(FIRST_S, _every_s)), None)
            log = self.logs.get(id(speaker))
            display = _display
            if speaker is None or log is None:
                return
            if display is not None:
                if not self._over.is_set():
                    display.draw(speaker, now)
                return
            if now - _said < _every_s:
                return
            line = speaker.line(now)
        heard()
        log.info("%s", line)
