"""Signals that are handled at once, even while the main thread runs C code, and processes that end with their parent.

This module does not decide what a signal means (see `train.launch`, `train.__main__` and `cli`). Invariants: a signal
that was ignored when the process began (nohup, `&` of a script) stays ignored. A listener is never called twice at the
same time.
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
"""Environment variable in which our launcher passes its pid to its ranks."""
SECOND_S = 1.0
"""Two SIGINTs within this time count as one Ctrl-C, because a terminal and a wrapper may both deliver it."""


def listen(
    numbers: tuple[signal.Signals, ...],
    hear: Callable[[signal.Signals], None],
    handler: Callable[[int, object], None] | None = None,
) -> None:
    """Call `hear` immediately, in a separate thread, for each arriving signal in `numbers`.

    `handler` runs in the main thread as soon as that leaves C code. Without `handler`, the main thread is not
    disturbed, and a second SIGINT, at least SECOND_S after the first, ends the process at once. Call this only from the
    main thread and once per process.
    """
    # the C part of Python's handler writes to the descriptor at once; the Python part waits for the main thread
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

    `expected` is the pid of that process, if known.
    """
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent or (expected is not None and parent != expected):
        sys.exit(f"the process {expected or parent} that started this one has already ended")


def end(code: int) -> NoReturn:
    """End this process now, from any thread, without the clean-up of other threads. Printed text is flushed first."""
    for stream in (sys.stdout, sys.stderr):
        # flush in a thread, so that a lost terminal or a held stream lock cannot block the exit
        flusher = threading.Thread(target=_flush, args=(stream,), daemon=True)
        flusher.start()
        flusher.join(1.0)
    os._exit(code)


def say(line: str) -> None:
    """Write one line to stderr and erase a bar that a rank left there. A lost terminal is not an error."""
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
