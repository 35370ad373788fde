"""metrics.jsonl: one line per step. It is the record of a run; everything else is made from it.

This module does not store per-token values (see `records.token_table`). Invariants: steps ascend without repetition; a
line is on disk before the next step starts, or no part of it is; a value that does not exist is null.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from tropd_mcore.files import append_text, publish_text, read_step_lines

log = logging.getLogger(__name__)


class JsonLines:
    """Appends to `path`. Lines that an earlier launch wrote for `start_step` or later are removed first."""

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        truncate(path, start_step)
        there = {record["step"] for record in read_step_lines(path)} if path.exists() else set()
        if missing := sorted(set(range(start_step)) - there):
            log.warning(
                "%s: no metrics of %d of the %d earlier steps, the first is step %d (was the file changed?); the run "
                "continues without them",
                path,
                len(missing),
                start_step,
                missing[0],
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line and flush it to disk. Raises DataError if the whole line cannot be written."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append_text(self._path, json.dumps({"step": step, **values}, allow_nan=False) + "\n")

    def close(self) -> None:
        """Nothing to close: each line opens and closes the file."""


def truncate(path: Path, step: int) -> None:
    """Keep the lines before `step` and drop an incomplete last line. The file is replaced as a whole or not at all."""
    if not path.exists():
        return
    kept = [record for record in read_step_lines(path) if record["step"] < step]
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept)
    if text.encode() != path.read_bytes():
        publish_text(path, text)
