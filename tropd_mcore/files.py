"""Files that are either whole or absent: written beside their place, flushed to disk, then renamed.

Not for directories (see `weights.hf_folder` and `mcore.checkpoint`).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

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
        partial.unlink(missing_ok=True)
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
