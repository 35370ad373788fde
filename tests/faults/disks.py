"""Small file systems that a fault fills: a tmpfs where the suite may mount one, else a limit on the size of files.

Invariant: what was mounted is unmounted.
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
        """Take every byte that is left."""
        with (self.root / "filler").open("ab", buffering=0) as stream:
            try:
                while True:
                    stream.write(b"\0" * 4096)
            except OSError:
                pass

    def free(self) -> None:
        """Give the room back."""
        (self.root / "filler").unlink(missing_ok=True)


def can_mount() -> bool:
    """Whether this user may mount a tmpfs here."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


@contextmanager
def small_disk(root: Path, mib: int = 64) -> Iterator[Disk]:
    """A tmpfs at `root`; raises CalledProcessError where it cannot be mounted."""
    root.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tropd-faults", str(root)], check=True)
    try:
        yield Disk(root)
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)
