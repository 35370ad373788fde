"""Where log lines and bars of this process go: one set-up, with one format, for every command and every rank.

Not for what is said (each module's logger) or when (`progress`). Invariants: rank 0 tells what it does, the other ranks
only what is wrong; a line never tears the bar of a terminal, and the bar never tears a line; colours and bars are for
terminals alone, colours only where NO_COLOR is not set.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, cast

from tropd_mcore import progress

if TYPE_CHECKING:
    from tqdm.std import tqdm as Tqdm

OWN_LOGGERS = ("tropd_mcore", "examples", "conversion", "benchmarks")
"""Loggers of this project, which rank 0 shows from INFO on."""

NOISY_LOGGERS = ("megatron", "httpx", "transformers", "torch", "asyncio", "filelock")
"""Libraries that announce what no user can act upon."""

_CLEAR_LINE = "\r\x1b[K"


def configure(rank: int = 0) -> None:
    """Set logging up for this process. Does nothing to the handlers of a program that has set up its own."""
    # Read by transformers when it is imported: its bars and its advice, per process.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for noisy in NOISY_LOGGERS:
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Megatron, torch and transformers announce deprecations of each other in every process.
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\b")
    for own in OWN_LOGGERS:
        logging.getLogger(own).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    terminal = is_terminal(sys.stderr)
    if not logging.getLogger().handlers:
        handler = _Handler(_CLEAR_LINE if terminal and rank != 0 else "")
        who = "" if rank == 0 else f"rank {rank}: "
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s {who}%(message)s", datefmt="%H:%M:%S"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if terminal and rank == 0:
        bar = Bar(sys.stderr)
        progress.report_on(bar)
        if is_terminal(sys.stdout) and not isinstance(sys.stdout, _WholeLines):
            sys.stdout = cast(TextIO, _WholeLines(sys.stdout))


def is_terminal(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def has_colour(stream: TextIO) -> bool:
    """Return whether colours may be written to `stream`: a terminal, and NO_COLOR is unset or empty."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def columns(stream: TextIO) -> int:
    """Return the width of the terminal `stream`; 80 where it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def printable(text: str) -> str:
    """Return `text` without the control characters by which a foreign text could move a terminal's cursor."""
    return "".join(character if character.isprintable() or character in "\n\t" else "?" for character in text)


class Bar:
    """One bar at the bottom of a terminal (tqdm), for the work that speaks at the moment."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._state: progress.Progress | None = None
        self._bar: Tqdm | None = None
        bars = _bars()
        self._lock = bars.get_lock()

    def draw(self, state: progress.Progress, now: float) -> None:
        """Show `state` in place of what is there."""
        with self._lock:
            if self._state is not state or self._bar is None:
                self._close()
                self._state, self._bar = state, self._open(state, now)
            self._bar.n, self._bar.ncols = state.done, columns(self._stream)
            beside = ", ".join(part for part in (state.rate(now), state.note) if part)
            self._bar.set_postfix_str(printable(beside), refresh=False)
            self._bar.refresh()

    def clear(self, state: progress.Progress) -> None:
        """Take away what is there, if it shows `state`."""
        with self._lock:
            if self._state is state:
                self._close()

    def _open(self, state: progress.Progress, now: float) -> Tqdm:
        unit = f" {state.unit}" if state.unit else ""
        if state.total is None:
            shape = "{desc}: {n_fmt}{unit}, {elapsed} so far{postfix}" if unit else "{desc}: {elapsed} so far{postfix}"
        else:
            shape = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt}{unit}, {remaining} left{postfix}"
        bar = _bars()(
            desc=printable(state.what),
            total=state.total,
            unit=unit,
            bar_format=shape,
            file=self._stream,
            leave=False,
            ncols=columns(self._stream),
            nrows=20,  # else nothing is drawn where the terminal does not say how high it is
            delay=1.0,  # not in the constructor, which knows neither what is done nor since when
            colour="green" if has_colour(self._stream) else None,
        )
        bar.delay, bar.start_t = 0.0, bar.start_t - (now - state.begun)
        return bar

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._state = self._bar = None


def _bars() -> type[Tqdm]:
    """The class of our bars. Without tqdm's own thread, and with a lock of this process alone: no semaphore files."""
    global _bar_class
    if _bar_class is None:
        from tqdm.std import tqdm

        class OwnBar(tqdm):
            monitor_interval = 0

        OwnBar.set_lock(threading.RLock())
        _bar_class = OwnBar
    return _bar_class


_bar_class: type[Tqdm] | None = None


@contextmanager
def _beside_the_bar() -> Iterator[None]:
    """Whatever terminal stream is written to in the block, no bar stands there; it is drawn again below."""
    if _bar_class is None:
        yield
        return
    with _bar_class.external_write_mode(file=sys.stderr):
        yield


class _Handler(logging.Handler):
    """Writes whole lines to stderr, beside the bar."""

    def __init__(self, before: str) -> None:
        super().__init__()
        self._before = before

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = printable(self.format(record))
            with _beside_the_bar():
                sys.stderr.write(f"{self._before}{line}\n")
                sys.stderr.flush()
            progress.heard()
        except Exception:
            self.handleError(record)


class _WholeLines:
    """A terminal's stdout: what is printed appears line by line, beside the bar."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = ""

    def write(self, text: str) -> int:
        """Write the lines that are complete, keep the rest."""
        whole, newline, self._begun = (self._begun + text).rpartition("\n")
        if newline:
            with _beside_the_bar():
                self._stream.write(whole + newline)
                self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Write what has no line end yet."""
        if self._begun:
            begun, self._begun = self._begun, ""
            self._stream.write(begun)
        self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
