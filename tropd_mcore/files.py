"""Writes files that are either complete or absent: written beside their place, flushed to disk, then renamed.

The exception is a file of step records (metrics.jsonl), which grows line by line; `read_step_lines` reads it. This
module does not write directories (see `weights.hf_folder` and `mcore.checkpoint`).
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from tropd_mcore.errors import DataError

log = logging.getLogger(__name__)

PARTIAL = ".partial"
"""Suffix of the name of a file or folder that is being written (`partial_name`)."""
_WRITER = re.compile(r"\.(\d+)@(.+)\.partial")
FORGOTTEN_S = 3600.0
"""Age after which a partial file from another machine counts as left over, because its process cannot be checked."""
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
"""Errors of a file system for an operation that it does not support."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def publish_file(path: Path, write: Callable[[BinaryIO], object], *, key: str = "run.dir") -> None:
    """Create or replace `path` with what `write` writes to the stream. A crash leaves the old file or none.

    Missing parent folders are made. Raises `DataError` if the place cannot be written; the message names `key` as the
    key to change.
    """
    partial = partial_name(path)
    try:
        with writing(path, key=key):
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
            sync(path.parent)
    except DataError:
        with suppress(OSError):
            partial.unlink()
        raise


def publish_text(path: Path, text: str, *, key: str = "run.dir") -> None:
    """`publish_file` for UTF-8 text."""
    publish_file(path, lambda stream: stream.write(text.encode()), key=key)


def append_text(path: Path, text: str, *, key: str = "run.dir") -> None:
    """Append `text` to `path` and flush it to the disk. If this fails, the file is unchanged.

    An incomplete last line, left by a crash, is removed first. Raises `DataError` like `publish_file`.
    """
    with writing(path, key=key), path.open("ab+", buffering=0) as stream:  # a buffer would be written again on close
        whole = _end_of_last_line(stream)
        stream.truncate(whole)
        rest = memoryview(text.encode())
        try:
            while rest:
                rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
        except OSError:
            with suppress(OSError):
                stream.truncate(whole)
            raise


def partial_name(path: Path) -> Path:
    """Return the file that this process writes and then renames to `path`: hidden, named by process and machine."""
    return path.with_name(f".{path.name}.{os.getpid()}@{os.uname().nodename}{PARTIAL}")


def remove_left_partials(folder: Path, pattern: str = ".*") -> int:
    """Remove the partial files and folders in `folder` that killed processes left; return how many.

    Partial files of this machine are removed if their process has ended. Those of another machine are removed if they
    were not modified for an hour.
    """
    removed = 0
    for path in folder.glob(f"{pattern}{PARTIAL}"):
        if _is_left_over(path):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                removed += 1
    return removed


def _is_left_over(path: Path) -> bool:
    writer = _WRITER.search(path.name)
    try:
        if writer is not None and writer[2] == os.uname().nodename:
            return not Path("/proc", writer[1]).exists()
        return time.time() - path.lstat().st_mtime > FORGOTTEN_S
    except OSError:
        return False


@contextmanager
def writing(path: Path, *, key: str = "run.dir") -> Iterator[None]:
    """Turn an OSError of the block, which writes `path`, into a `DataError` with one line for the user."""
    try:
        yield
    except OSError as error:
        raise DataError(cannot_write(path, error, key=key)) from error


def cannot_write(path: Path, error: OSError, *, key: str = "run.dir") -> str:
    """Return one line that says why `path` cannot be written and what to do; it names `key`."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return f"cannot write {shown(path)}: {reason}; make room there and run it again, or set {key} to another place"
    return f"cannot write {shown(path)}: {reason}; set {key} to a place with room and rights"


def shown(path: Path | str) -> str:
    """Return a path for a message: on one line, with control characters and undecodable bytes escaped."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk. Raises OSError.

    Some file systems (FUSE, CIFS) do not flush directories. There, a crash of the machine may lose the newest names.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not path.is_dir():
            raise
        _say_once(path, error)
    finally:
        os.close(descriptor)


@cache
def _told() -> set[int]:
    """Devices for which `sync` has already logged that they do not flush directories."""
    return set()


def _say_once(path: Path, error: OSError) -> None:
    device = path.stat().st_dev
    if device not in _told():
        _told().add(device)
        log.warning(
            "%s: this file system does not flush directories (%s): a crash of the machine may lose the newest files",
            shown(path),
            error.strerror,
        )


def _end_of_last_line(stream: FileIO) -> int:
    """The offset after the last newline, searched from the end."""
    end = stream.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        stream.seek(start)
        found = stream.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal text. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_step_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file in order; [] if there is no file. An incomplete last line is left out.

    Raises `DataError` if any other line is not a step record.
    """
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}; restore it or move it away") from error
    records = []
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # text after the last newline is incomplete
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{shown(path)}:{number}: expected a JSON object with `step`, found {line[:80]!r}; restore or remove "
                "this line"
            ) from error
        records.append(record)
    return records
