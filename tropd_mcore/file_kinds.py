"""Recognises what is at a path where a file is expected, from the first bytes, for error messages of all file readers.

This module does not read contents (see `data`, `weights`). Invariants: nothing here blocks, so a pipe or a device is
recognised by its type and never opened. At most 512 bytes of a file are read.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from tropd_mcore.files import shown

HEAD_BYTES = 512
"""Number of bytes read from the start of a file; the mark of a tar archive ends at byte 262."""
EMPTY = "an empty file"
NOTHING = "nothing"
PARQUET = "a parquet file"
LFS_POINTER = b"version https://git-lfs"
"""First bytes of a Git LFS pointer, a text of three lines in place of a large file."""
_UNPACK = "unpack it"
_CONVERT = "convert it to JSONL, one object per line, in UTF-8"
_SAFETENSORS = "save the model with safetensors (`save_pretrained(..., safe_serialization=True)`)"
_BINARY = (
    (LFS_POINTER, "a Git LFS pointer", "fetch the file itself with `git lfs pull`"),
    (b"PAR1", PARQUET, f"{_CONVERT} (prompts: `tropd prompts`)"),
    (b"ARROW1", "an Arrow file", _CONVERT),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _CONVERT),
    (b"SQLite format 3\x00", "a SQLite database", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"%PDF-", "a PDF document", _CONVERT),
    (b"GGUF", "a GGUF model", _SAFETENSORS),
    (b"\x80\x02", "a pickle", _SAFETENSORS),
    (b"\x80\x03", "a pickle", _SAFETENSORS),
    (b"\x80\x04", "a pickle", _SAFETENSORS),
    (b"\x80\x05", "a pickle", _SAFETENSORS),
    (b"PK\x03\x04", "a zip archive (a folder, .npz or .bin of PyTorch)", _UNPACK),
    (b"PK\x05\x06", "an empty zip archive", "put the file itself there"),
)
"""(first bytes, name, what to do) for files that are not text."""
_RECODE = "save it as UTF-8 (iconv -t utf-8)"
_TEXT = (
    (b"\xff\xfe\x00\x00", "text in UTF-32", _RECODE),
    (b"\x00\x00\xfe\xff", "text in UTF-32", _RECODE),
    (b"\xff\xfe", "text in UTF-16", _RECODE),
    (b"\xfe\xff", "text in UTF-16", _RECODE),
)
_PAGE = (b"<!doctype", b"<html", b"<?xml")
_MODES = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True)
class Found:
    """What was found in place of the expected file."""

    what: str
    """Name with article: `a parquet file`"""
    cure: str
    """What the user should do"""

    def __str__(self) -> str:
        """Return the end of a message: `found a parquet file; convert it to JSONL`."""
        return f"not found; {self.cure}" if self.what == NOTHING else f"found {self.what}; {self.cure}"


def in_the_way(path: Path, *, zip_wanted: bool = False) -> Found | None:
    """Return what prevents `path` from being read as the expected file; None if nothing does.

    The path may be missing, a dangling link, unreadable for this user, not a regular file, empty, or, by its first
    bytes, a file of another kind. `zip_wanted`: the expected file is a zip archive (`.npz`).
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return _absent(path, error)
    for holds, name in _MODES:
        if holds(mode):
            return Found(name, "put a file there or name another one")
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except PermissionError:
        return Found("a file that this user may not read", f"give the right to read it (chmod u+r {shown(path)})")
    except OSError as error:
        return Found(f"a file that cannot be read ({error.strerror})", "look at its disk, or fetch it again")
    found = kind_of(head)
    return None if found is not None and zip_wanted and head.startswith(b"PK\x03\x04") else found


def kind_of(head: bytes) -> Found | None:
    """Return the kind of a file that begins with `head`; None if it may be text or weights that we read."""
    if not head:
        return Found(EMPTY, "write it or fetch it again")
    for marks in (_BINARY, _TEXT):
        for mark, name, cure in marks:
            # a safetensors file begins with a size, which can look like a two-byte mark; zeros follow it
            if head.startswith(mark) and not (len(mark) == 2 and head[2:3] == b"\0"):
                return Found(name, cure)
    if not any(head):
        return Found("a file of zeros, as a crash of the machine can leave it", "write it or fetch it again")
    if head[257:262] == b"ustar":
        return Found("a tar archive", _UNPACK)
    if head.lstrip().lower().startswith(_PAGE):
        return Found("a web page", "fetch the file itself: this is what a server says instead of it")
    if _half_zero(head):
        return Found("text in UTF-16", _RECODE)
    return None


def folder_in_the_way(path: Path) -> Found | None:
    """Return what is found in place of an expected folder; None if `path` is a folder that can be listed."""
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            next(iter(path.iterdir()), None)
            return None
    except PermissionError:
        return Found("a folder that this user may not enter", "give the right to read and enter it (chmod u+rx)")
    except OSError as error:
        return _absent(path, error)
    return Found("a file", "name the folder that holds it")


def _absent(path: Path, error: OSError) -> Found:
    if path.is_symlink():
        return Found(f"a link to {shown(os.readlink(path))}, which is not there", "mend the link")
    if isinstance(error, FileNotFoundError):
        return Found(NOTHING, "check the path")
    if isinstance(error, PermissionError):
        return Found("a folder that this user may not enter", "give the right to enter it (chmod u+x)")
    if isinstance(error, NotADirectoryError):
        return Found("a file where a folder should be", "check the path")
    return Found(f"a path that cannot be looked at ({error.strerror})", "check the path")


def _half_zero(head: bytes) -> bool:
    """Whether every second byte is zero, as in UTF-16 text of ASCII characters without a byte-order mark."""
    pairs = len(head) // 2
    return pairs >= 2 and (not any(head[1 : 2 * pairs : 2]) or not any(head[0 : 2 * pairs : 2]))
