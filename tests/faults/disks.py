"""Small file systems for faults to fill: a tmpfs if the suite may mount one, else a limit on file sizes.

Invariant: every mounted file system is unmounted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Disk:
    """A mounted file system of a few MiB."""

    root: Path

    def fill(self) -> None:
        """Fill all remaining space."""
        with (self.root / "filler").open("ab", buffering=0) as stream:
            try:
                while True:
                    stream.write(b"\0" * 4096)
            except OSError:
                pass

    def free(self) -> None:
        """Free the space."""
        (self.root / "filler").unlink(missing_ok=True)


def can_mount() -> bool:
    """Whether this user may mount a tmpfs here."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


@contextmanager
def small_disk(root: Path, mib: int = 64) -> Iterator[Disk]:
    """A tmpfs at `root`. Raises CalledProcessError if it cannot be mounted."""
    root.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tropd-faults", str(root)], check=True)
    try:
        yield Disk(root)
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)
