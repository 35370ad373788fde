"""Measure how long a command is silent: run it and write its output with the time of each line.

    python -m tests.faults.silence [--terminal] [--send SIGINT:"step 3"] [--limit 30] [--out FILE] -- COMMAND ...

This module does not judge the output. Invariant: every second of the command is counted, from its start to the end of
its output, whatever it does to its terminal.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

COLUMNS, ROWS = 100, 40
"""Size of the terminal."""
LEFT_OPEN_S = 5.0
"""Seconds for which output held open by another process is read after the end of the command."""
REDRAWN_EVERY_S = 10.0
"""Seconds in which at most one state of a progress bar is kept."""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")


@dataclass(frozen=True)
class Order:
    """A signal that is sent once, `seconds` after the start or after a line with `text`."""

    number: signal.Signals
    seconds: float | None
    text: str

    @classmethod
    def parse(cls, given: str) -> Order:
        """Read SIGNAL:SECONDS or SIGNAL:TEXT."""
        name, _, when = given.partition(":")
        try:
            return cls(signal.Signals[name], float(when), "")
        except ValueError:
            return cls(signal.Signals[name], None, when)
        except KeyError as error:
            raise argparse.ArgumentTypeError(f"{given}: expected SIGINT:12.5 or SIGTERM:some text") from error

    def is_due(self, seconds: float, line: str | None) -> bool:
        """Whether to send it at this second, given the line that has just arrived, if any."""
        if self.seconds is not None:
            return seconds >= self.seconds
        return line is not None and self.text in line


@dataclass
class Said:
    """Lines with their times, and the times of all output."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    seconds: float = 0.0
    code: int = 0
    sent: list[tuple[float, str]] = field(default_factory=list)

    def first_s(self) -> float:
        """Seconds until the first output."""
        return self.times[0] if self.times else self.seconds

    def longest(self) -> tuple[float, float]:
        """(seconds of the longest silence, second of its start), including silence before and after all output."""
        marks = [0.0, *self.times, self.seconds]
        return max(((after - before, before) for before, after in pairwise(marks)))

    def text(self, command: Sequence[str]) -> str:
        """All lines for a reader, with totals at the end."""
        silence, at = self.longest()
        ends = "" if self.code >= 0 else f" ({signal.Signals(-self.code).name})"
        rows = sorted([*self.lines, *((second, f"<- {name}") for second, name in self.sent)], key=lambda row: row[0])
        return "\n".join(
            [
                f"$ {' '.join(command)}",
                *(f"{second:8.1f}  {line}" for second, line in rows),
                f"exit code {self.code}{ends} after {self.seconds:.1f} s; first output after {self.first_s():.1f} s; "
                f"longest silence {silence:.1f} s, from second {at:.1f}",
                "",
            ]
        )


class Reader:
    """Converts output to the lines that a terminal would show. A redrawn line is not a new line."""

    def __init__(self, said: Said) -> None:
        self._said = said
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._drawn = -REDRAWN_EVERY_S

    def feed(self, data: bytes, second: float) -> list[str]:
        """Take the output that arrived at `second`. Returns the lines that it completes."""
        self._said.times.append(second)
        *whole, self._line = (self._line + self._decoder.decode(data)).replace("\r\n", "\n").split("\n")
        ended = [shown for line in whole if (shown := _last_picture(line)) or not line.strip()]
        self._said.lines += [(second, line) for line in ended]
        if "\r" in self._line and second - self._drawn >= REDRAWN_EVERY_S and (picture := _last_picture(self._line)):
            self._drawn = second
            self._said.lines.append((second, f"~ {picture}"))
        return ended

    def close(self, second: float) -> None:
        """Take the rest, which has no end of line."""
        if rest := _last_picture(self._line):
            self._said.lines.append((second, rest))


def _last_picture(line: str) -> str:
    """The content of a line after all carriage returns, without colours."""
    pictures = [picture for picture in _ESCAPES.sub("", line).split("\r") if picture]
    return pictures[-1].rstrip() if pictures else ""  # a line of only blanks wipes the previous content


def watch(
    command: Sequence[str], *, terminal: bool = False, orders: Sequence[Order] = (), folder: Path | None = None
) -> Said:
    """Run `command` to its end, on its own terminal or with one pipe for both outputs.

    SIGINT goes to all processes of the command, as with Ctrl-C. Other signals go only to the started process.
    """
    said = Said()
    reader, waiting = Reader(said), list(orders)
    start = time.monotonic()
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = os.environ | ({"TERM": "xterm"} if terminal else {})
    process = subprocess.Popen(
        list(command),
        stdin=theirs if terminal else subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    open_, ended = True, float("inf")
    while process.poll() is None or (open_ and time.monotonic() < ended + LEFT_OPEN_S):
        ended = ended if process.poll() is None else min(ended, time.monotonic())
        lines: list[str] = []
        if open_ and select.select([ours], [], [], 0.1)[0]:
            data = _read(ours)
            open_ = bool(data)
            if data:
                lines = reader.feed(data, time.monotonic() - start)
        elif not open_:
            time.sleep(0.1)
        _send(process, waiting, lines or [None], said, time.monotonic() - start)
    said.code, said.seconds = process.wait(), time.monotonic() - start
    reader.close(said.seconds)
    if open_ and time.monotonic() >= ended + LEFT_OPEN_S:
        said.lines.append((said.seconds, "<- the command has ended, and another process still holds its output"))
    os.close(ours)
    return said


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # raised by a terminal whose last process has ended
        return b""


def _send(
    process: subprocess.Popen[bytes], waiting: list[Order], lines: Sequence[str | None], said: Said, second: float
) -> None:
    for order in [order for order in waiting if any(order.is_due(second, line) for line in lines)]:
        waiting.remove(order)
        if process.poll() is not None:
            continue
        said.sent.append((second, order.number.name))
        if order.number is signal.SIGINT:
            os.killpg(process.pid, order.number)
        else:
            process.send_signal(order.number)


def main(arguments: list[str] | None = None) -> int:
    """Run one command line. Returns 1 if the silence was longer than --limit, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.silence", description="How long is it silent?")
    parser.add_argument("--terminal", action="store_true", help="run it on a terminal (a pipe)")
    parser.add_argument("--send", type=Order.parse, action="append", default=[], metavar="SIGNAL:SECONDS|TEXT")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="S", help="longest silence that is fine")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the text goes (stdout)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command given")
    said = watch(command, terminal=options.terminal, orders=options.send)
    text = said.text(command)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
        print(text.splitlines()[-1])
    else:
        print(text, end="")
    return int(said.longest()[0] > options.limit)


if __name__ == "__main__":
    sys.exit(main())
