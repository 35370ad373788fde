"""Sets up log lines and progress bars of this process, with one format for every command and every rank.

The texts come from each module's logger, and `progress` decides when a bar or line is due. Invariants: rank 0 logs from
INFO on, the other ranks only warnings and errors. Log lines and bars never garble each other. Bars and colours appear
only on terminals, and colours only if NO_COLOR is not set.
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
"""Libraries whose messages below ERROR no user can act on."""

_CLEAR_LINE = "\r\x1b[K"


def configure(rank: int = 0) -> None:
    """Set up logging for this process. If the program has its own handlers, they are left alone."""
    # transformers reads these at import; they turn off its bars and advice in every process
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for noisy in NOISY_LOGGERS:
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Megatron, torch and transformers warn about each other's deprecations in every process.
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
    """Return the width of the terminal `stream`; 80 if it is unknown."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def printable(text: str) -> str:
    """Return `text` with control characters replaced by "?", so that foreign text cannot move a terminal's cursor."""
    return "".join(character if character.isprintable() or character in "\n\t" else "?" for character in text)


class Bar:
    """One bar (tqdm) at the bottom of a terminal, for the work that is reported at the moment."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._state: progress.Progress | None = None
        self._bar: Tqdm | None = None
        bars = _bars()
        self._lock = bars.get_lock()

    def draw(self, state: progress.Progress, now: float) -> None:
        """Show `state` in place of the current bar."""
        with self._lock:
            if self._state is not state or self._bar is None:
                self._close()
                self._state, self._bar = state, self._open(state, now)
            self._bar.n, self._bar.ncols = state.done, columns(self._stream)
            beside = ", ".join(part for part in (state.rate(now), state.note) if part)
            self._bar.set_postfix_str(printable(beside), refresh=False)
            self._bar.refresh()

    def clear(self, state: progress.Progress) -> None:
        """Remove the bar if it shows `state`."""
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
            nrows=20,  # otherwise nothing is drawn on a terminal of unknown height
            delay=1.0,  # no drawing in the constructor, which does not know the count and the start time yet
            colour="green" if has_colour(self._stream) else None,
        )
        bar.delay, bar.start_t = 0.0, bar.start_t - (now - state.begun)
        return bar

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._state = self._bar = None


def _bars() -> type[Tqdm]:
    """The class of our bars: without tqdm's own thread, and with a lock of this process only (no semaphore files)."""
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
    """Remove the bar while the block writes to a terminal stream, and draw it again below."""
    if _bar_class is None:
        yield
        return
    with _bar_class.external_write_mode(file=sys.stderr):
        yield


class _Handler(logging.Handler):
    """Writes whole lines to stderr, above the bar."""

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
    """A terminal's stdout: printed text appears line by line, above the bar."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = ""

    def write(self, text: str) -> int:
        """Write the complete lines and keep the rest."""
        whole, newline, self._begun = (self._begun + text).rpartition("\n")
        if newline:
            with _beside_the_bar():
                self._stream.write(whole + newline)
                self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Write the text of the incomplete line."""
        if self._begun:
            begun, self._begun = self._begun, ""
            self._stream.write(begun)
        self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
