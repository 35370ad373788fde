"""Files that are either whole or absent: written beside their place, flushed to disk, then renamed.

The exception is a file of step records (metrics.jsonl), which grows by a line at a time; here is how it is read.
Not for directories (see `weights.hf_folder` and `mcore.checkpoint`).
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from tropd_mcore.errors import DataError


def publish_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace `path` with what `write` puts into the stream; a crash leaves the old file or none.

    Raises `DataError` where the place cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; set run.dir to a place with room and rights"
        ) from error


def publish_text(path: Path, text: str) -> None:
    """`publish_file` for UTF-8 text."""
    publish_file(path, lambda stream: stream.write(text.encode()))


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal text. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_step_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file in order; a last line cut off by a crash is left out, no file is no lines.

    Raises `DataError` where another line is not one of ours.
    """
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was never finished
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: expected a JSON object with `step`, found {line[:80]!r}") from error
        records.append(record)
    return records
