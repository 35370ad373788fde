"""The log of a started server, rotated while the server writes to it.

This module does not handle our own log lines (see `logs`). The server holds the file open and cannot be told to reopen
it. So the file is copied to `<name>.log.1` and then truncated in place; the server appends and continues at the start.
Invariants: both files together stay below twice the limit plus what is written in LOOK_EVERY_S. Only lines written
between the copy and the truncation (milliseconds) can be lost. Only this user can read the files.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
TAIL_BYTES = 65536


class ServerLog:
    """The log at `path`, of at most `max_bytes`. One server writes to it at a time."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._older = path.with_name(f"{path.name}.1")
        self._max_bytes = max_bytes
        self._start = 0
        self._older_start: int | None = None
        """Offset in the older file where this start's lines begin; None if it holds none of them"""
        self._turn = threading.Lock()
        self._told = False
        """Whether the warning about a growing log was logged"""
        self._keeper: threading.Thread | None = None
        self._over = threading.Event()

    def open(self) -> BinaryIO:
        """Return a stream for the server to append to, and watch the file's size until `close`."""
        self.close()
        if self._size() > self._max_bytes:
            self._path.replace(self._older)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, 0o600)
        self._start, self._older_start = os.fstat(descriptor).st_size, None
        self._over = threading.Event()
        self._keeper = threading.Thread(target=self._keep, args=(self._over,), name="server-log", daemon=True)
        self._keeper.start()
        return os.fdopen(descriptor, "ab")

    def close(self) -> None:
        """Stop watching the size."""
        if self._keeper is not None:
            self._over.set()
            self._keeper.join()
            self._keeper = None

    def tail(self) -> list[str]:
        """Return the last non-empty lines since the start, stripped."""
        with self._turn:
            found = _end_of(self._path, self._start, TAIL_BYTES)
            if self._older_start is not None:
                found = _end_of(self._older, self._older_start, TAIL_BYTES - len(found)) + found
        return [line.strip() for line in found.decode(errors="replace").splitlines() if line.strip()]

    def rotate(self) -> bool:
        """Move the content to the older file if it is over the limit; return whether that was done.

        Raises OSError if there is no room for the copy; the log is then unchanged.
        """
        if self._size() <= self._max_bytes:
            return False
        partial = self._older.with_name(f"{self._older.name}.partial")
        with self._turn:
            try:
                self._copy(partial)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            partial.replace(self._older)
            os.truncate(self._path, 0)
            self._start, self._older_start = 0, self._start
        return True

    def _copy(self, partial: Path) -> None:
        with self._path.open("rb") as source, partial.open("wb") as target:
            os.fchmod(target.fileno(), 0o600)
            shutil.copyfileobj(source, target, 2**20)
            # lines written during the copy
            shutil.copyfileobj(source, target, 2**20)

    def _keep(self, over: threading.Event) -> None:
        while not over.wait(LOOK_EVERY_S):
            try:
                self.rotate()
            except OSError as error:
                if not self._told:
                    log.warning("%s: cannot be rotated yet (%s); it keeps growing", self._path, error.strerror)
                self._told = True
            else:
                self._told = False

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0


def _end_of(path: Path, start: int, limit: int) -> bytes:
    """The last bytes of a file, at most `limit` and none before `start`; empty if there is no file."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(min(start, size), size - limit))
            return stream.read(limit)
    except FileNotFoundError:
        return b""
