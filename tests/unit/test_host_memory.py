"""Freed memory is returned to the machine, even if a block above it stays in use."""

from __future__ import annotations

from pathlib import Path

from tropd_mcore.weights.host_memory import release_freed_memory

BLOCK = 1 << 16
"""Bytes. Below the size from which the C library maps a block separately, and so returns it by itself."""
BLOCKS = 1500


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def test_freed_memory_between_blocks_in_use_is_returned_to_the_machine() -> None:
    blocks = [bytearray(b"x" * BLOCK) for _ in range(BLOCKS)]
    kept = blocks[::100]
    kept.append(blocks[-1])
    del blocks
    before = anonymous()
    release_freed_memory()
    assert before - anonymous() > BLOCKS * BLOCK // 2
    assert all(block == b"x" * BLOCK for block in kept)
