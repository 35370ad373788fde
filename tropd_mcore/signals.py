"""Signals that act at once, also while the main thread is inside C code, and processes that end with their parent.

Not for what a signal means (`train.launch`, `train.__main__` and `cli` decide). Invariants: a signal whose disposition
was "ignore" when the process began (nohup, `&` of a script) stays ignored; a listener never runs twice at a time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

PR_SET_PDEATHSIG = 1
LAUNCHER_VARIABLE = "TROPD_LAUNCHER_PID"
"""Our launcher leaves its pid here for its ranks."""
SECOND_S = 1.0
"""A terminal and a wrapper may pass the same Ctrl-C on twice; a person takes longer than this."""


def listen(
    numbers: tuple[signal.Signals, ...],
    hear: Callable[[signal.Signals], None],
    handler: Callable[[int, object], None] | None = None,
) -> None:
    """Call `hear` in a thread of its own for each of these signals that arrives, at once.

    `handler` runs in the main thread, once that is out of C code; without it the main thread goes on undisturbed, and a
    second SIGINT, at least SECOND_S after the first, ends the process at once. Only from the main thread, once per
    process.
    """
    # the kernel side of Python's handler writes to the descriptor at once; the Python side waits for the main thread
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    act = handler or _second_at_once()
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, act)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_pass_on, args=(reader, writer, numbers, hear), name="signals", daemon=True).start()


def _second_at_once() -> Callable[[int, object], None]:
    first: list[float] = []

    def handle(number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            first.append(time.monotonic())
            if first[-1] - first[0] >= SECOND_S:
                os._exit(128 + number)

    return handle


def die_with_parent(expected: int | None = None) -> None:
    """Ask the kernel for SIGKILL when the process that started this one ends; exit at once if it already has.

    `expected` is the pid of that process where it is known.
    """
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent or (expected is not None and parent != expected):
        sys.exit(f"the process {expected or parent} that started this one has already ended")


def end(code: int) -> NoReturn:
    """End this process now, from any thread, without the clean-up of other threads; what was printed is flushed."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal that is gone, or a thread that holds the stream's lock, does not keep the process
        flusher = threading.Thread(target=_flush, args=(stream,), daemon=True)
        flusher.start()
        flusher.join(1.0)
    os._exit(code)


def say(line: str) -> None:
    """Write one line to stderr; a terminal that is gone is no error, and a bar that a rank left there is wiped."""
    try:
        wipe = "\r\x1b[K" if os.isatty(2) and os.environ.get("TERM", "") not in ("", "dumb") else ""
        os.write(2, f"{wipe}{line}\n".encode(errors="backslashreplace"))
    except OSError:
        return


def _flush(stream: object) -> None:
    try:
        stream.flush()  # type: ignore[attr-defined]
    except (OSError, ValueError):
        return


def _pass_on(
    reader: socket.socket,
    writer: socket.socket,
    numbers: tuple[signal.Signals, ...],
    hear: Callable[[signal.Signals], None],
) -> None:
    assert writer.fileno() >= 0, "kept open for the handler"
    while True:
        for number in reader.recv(64):
            if number in numbers:
                hear(signal.Signals(number))
