"""Writes the per-token values of some samples of a step as `.npz` arrays, for the report.

Metrics do not use this file; they are computed over all rows of the step (`token_table`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tropd_mcore.files import publish_file
from tropd_mcore.types import TokenTable

VERDICTS = "verdict"
"""Name of the array with the verifier's verdict on every sample of the step: 1 right, 0 wrong, -1 not judged."""


def save_token_sample(
    path: Path, table: TokenTable, samples: int, verdicts: Sequence[bool | None] | None = None
) -> None:
    """Publish the rows of `samples` samples of the step for the report, with the values of the first epoch.

    The samples are spread evenly over the step, so they cover several prompts. `verdicts` has one entry per sample of
    the step: whether it is right, or None if it was not judged.
    """
    there = np.unique(table["sample_index"].astype(np.int64))
    spread = there[np.linspace(0, len(there) - 1, min(samples, len(there))).round().astype(np.int64)]
    keep = np.isin(table["sample_index"], spread) & (table["epoch"] == 0)
    columns = {name: values[keep] for name, values in table.columns.items()}
    if verdicts is not None:
        columns[VERDICTS] = np.array([-1 if verdict is None else int(verdict) for verdict in verdicts], dtype=np.int8)

    archive = io.BytesIO()  # not straight to the file: numpy reports a full disk as another error
    np.savez(archive, allow_pickle=False, **columns)
    publish_file(path, lambda stream: stream.write(archive.getbuffer()))
