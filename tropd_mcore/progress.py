"""Signs of life of everything that takes long: what runs, how far it is, how much time is left.

Not for the metrics of a step (`monitor`) and not for where lines go (`logs`, which also says whether there is a
terminal). On a terminal there is one bar, in a log one plain line every few seconds. Invariants: nothing that runs
inside `progress` is silent for longer than `report_every` allows; what ends within 5 s says nothing; where pieces of
work are nested, only the innermost one speaks; the reporting thread ends with the outermost block, whatever that does.
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
"""Seconds between two lines in a log unless `report_every` says otherwise (monitor.progress_every_s)."""
FIRST_S = 5.0
"""Work that has lasted less says nothing."""
STALLED_S = 30.0
"""Seconds without anything done after which the line says so."""
TICK_S = 0.5
"""Seconds between two looks of the reporting thread, and between two pictures of the bar."""


@dataclass(eq=False)
class Progress:
    """How far one piece of work is. `total` is None where nobody knows.

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
    """When something was done last (monotonic seconds)."""

    def advance(self, count: int = 1, note: str | None = None, *, amount: float = 0.0) -> None:
        """Say that `count` more units are done; `note` is shown beside them, and replaces the one before."""
        self.done += count
        self.amount += amount
        self.note = self.note if note is None else note
        self.moved = time.monotonic()
        tick()

    def rate(self, now: float) -> str:
        """Return the rate of `amount`, for example "412 tok/s"; empty where nothing is counted."""
        seconds = now - self.begun
        if not self.amount_unit or not self.amount or seconds <= 0:
            return ""
        return f"{_amount(self.amount / seconds)}{self.amount_unit}/s"

    def left_s(self, now: float) -> float | None:
        """Return the seconds that are left if it goes on as until now; None where nobody knows."""
        if not self.total or not self.done:
            return None
        return (now - self.begun) / self.done * max(self.total - self.done, 0)

    def line(self, now: float) -> str:
        """Return all that is known as one line, for a log."""
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
    """Where the bar of a terminal is drawn (`logs`)."""

    def draw(self, state: Progress, now: float) -> None:
        """Show `state` in place of what is there."""

    def clear(self, state: Progress) -> None:
        """Take away what is there, if it shows `state`."""


def duration(seconds: float) -> str:
    """Return `seconds` as a reader says it: "40 s", "12 min", "3.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def _amount(value: float) -> str:
    """With three digits or more, and the prefix of its unit: "0.82 ", "412 ", "51.3 k", "812.4 M"."""
    if value < 1e4:
        return f"{value:.0f} " if value >= 100 else f"{value:.3g} "
    return f"{value / 1e3:.1f} k" if value < 1e6 else f"{value / 1e6:.1f} M"


def activity() -> str:
    """Return what this process is at, for messages about it; empty where nothing long runs.

    Takes no lock: who watches a rank asks for it, and a terminal that takes no output must not stop that.
    """
    top = _stack[-1:]
    return top[0].what if top else ""


def ticks() -> int:
    """Return a number that grows whenever this process gets on with anything."""
    return _ticks


def tick() -> None:
    """Say that this process gets on with something that is not counted."""
    global _ticks
    _ticks += 1


def report_every(seconds: float) -> None:
    """From now on, put at most `seconds` between two lines in a log (monitor.progress_every_s)."""
    global _every_s
    _every_s = seconds


def report_on(display: Display | None) -> None:
    """From now on, draw a bar on `display` in place of lines; None: lines in the log."""
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
    """Report `what` until the block ends; the block says how far it is by `advance`.

    `total` counts `unit`s; without it the line says how long it has been. See `Progress` for `amount_unit`.
    """
    state = Progress(what, total, unit, amount_unit)
    _enter(state, log)
    try:
        yield state
    finally:
        _leave(state)


def counted(items: Iterable[Item], state: Progress) -> Iterator[Item]:
    """Yield the items, and count each when the next one is asked for."""
    for item in items:
        yield item
        state.advance()


def heard() -> None:
    """Take note that a line has just been written: the next sign of life has time."""
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
    """Looks at the stack until it is empty; speaks for the innermost work that has lasted long enough."""

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
