"""Publishes a folder atomically: it is written beside its final place, flushed to disk, then renamed.

This module does not publish single files. Invariant: whenever the process or the machine dies, the final name is either
absent or names a complete folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tropd_mcore.errors import ModelError
from tropd_mcore.files import shown, sync


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty sibling of `out` to write into. On success it becomes `out`; on an exception it is removed.

    A leftover of a killed run is replaced. Raises ModelError if `out` exists and is not an empty directory, or if its
    parent cannot be written. An OSError in the block is raised as ModelError too.
    """
    check_new_folder(out)
    partial = out.parent / f".{out.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ModelError(f"cannot write to {shown(out.parent)}: {error.strerror}; choose another place") from error
    try:
        yield partial
        fsync_tree(partial)
        os.replace(partial, out)
        sync(out.parent)
    except OSError as error:
        raise ModelError(
            f"cannot write {shown(out)}: {error.strerror or error}; make room there, or choose another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # does nothing after the rename


def replace_folder(fresh: Path, final: Path) -> None:
    """Rename `fresh` to `final` and remove an older folder of that name. Raises ModelError if writing fails.

    A crash in between leaves the new folder under the name `fresh`, or the old one as `.<name>.replaced`.
    """
    replaced = final.with_name(f".{final.name}.replaced")
    try:
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            os.replace(final, replaced)
        os.replace(fresh, final)
        sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"cannot write to {shown(final.parent)}: {error.strerror}; give the job room and rights there"
        ) from error


def check_new_folder(out: Path) -> None:
    """Raise ModelError if `out` exists and is not an empty directory."""
    if out.exists() and not out.is_dir():
        raise ModelError(f"output {out}: a file of that name exists; expected a new or empty directory")
    if out.is_dir() and any(out.iterdir()):
        raise ModelError(f"output {out}: not empty; choose a new directory or remove its content")


def fsync_tree(folder: Path) -> None:
    """Flush every file and directory under `folder`, and `folder` itself."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)
