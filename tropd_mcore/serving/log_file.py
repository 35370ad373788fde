"""The log of a started server: bounded in size while the server writes to it, with one older file.

Not for our own lines (`logs`). The server holds a descriptor of the file and knows nothing of us, so the file is copied
to `<name>.log.1` and then cut to nothing in place: the server appends, and goes on at the start. Invariants: both files
together stay below twice the limit and what is written in LOOK_EVERY_S; at most what comes between the copy and the cut
is lost (milliseconds); only this user can read them.
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
        """Where the older file goes on with what came since the start; None where nothing of that is in it"""
        self._turn = threading.Lock()
        self._told = False
        """Whether it was said that the log grows"""
        self._keeper: threading.Thread | None = None
        self._over = threading.Event()

    def open(self) -> BinaryIO:
        """Return a stream for the server to append to, and watch the size from now on, until `close`."""
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
        """Watch the size no longer."""
        if self._keeper is not None:
            self._over.set()
            self._keeper.join()
            self._keeper = None

    def tail(self) -> list[str]:
        """Return the last lines with text since the start, without space around them."""
        with self._turn:
            found = _end_of(self._path, self._start, TAIL_BYTES)
            if self._older_start is not None:
                found = _end_of(self._older, self._older_start, TAIL_BYTES - len(found)) + found
        return [line.strip() for line in found.decode(errors="replace").splitlines() if line.strip()]

    def rotate(self) -> bool:
        """Move what is there to the older file if it is over the limit; return whether it was.

        Raises OSError where there is no room for the copy; the log is as it was then.
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
            # what came while the copy was made
            shutil.copyfileobj(source, target, 2**20)

    def _keep(self, over: threading.Event) -> None:
        while not over.wait(LOOK_EVERY_S):
            try:
                self.rotate()
            except OSError as error:
                if not self._told:
                    log.warning("%s: cannot be rotated yet (%s); it goes on growing", self._path, error.strerror)
                self._told = True
            else:
                self._told = False

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0


def _end_of(path: Path, start: int, limit: int) -> bytes:
    """The last bytes of a file, at most `limit` and none before `start`; nothing where there is no file."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(min(start, size), size - limit))
            return stream.read(limit)
    except FileNotFoundError:
        return b""
