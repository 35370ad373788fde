"""The per-token results of a step, from the ranks that computed them to one table on rank 0.

Invariant: the table does not depend on the parallel layout, the packing or the micro-batch split: rows are ordered by
sample and token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from tropd_mcore.files import publish_file
from tropd_mcore.types import MicroBatch, TokenTable

Columns = Mapping[str, torch.Tensor]


def local_columns(micro_batches: Sequence[MicroBatch], outputs: Sequence[Columns]) -> dict[str, np.ndarray]:
    """This rank's rows as numpy columns, [rows of all its micro-batches]; one copy to the host a column."""
    where = {
        "sample_index": [micro_batch.sample_index for micro_batch in micro_batches],
        "token_index": [micro_batch.token_index for micro_batch in micro_batches],
        "behav_logp": [micro_batch.behav_logp for micro_batch in micro_batches],
    }
    what = {name: [output[name] for output in outputs] for name in (outputs[0] if outputs else {})}
    return {name: torch.cat(pieces).cpu().numpy() for name, pieces in {**where, **what}.items()}


def merge_columns(parts: Sequence[Mapping[str, np.ndarray]]) -> TokenTable:
    """One table of all ranks' columns; ranks without rows of their own (other stages, tensor rank > 0) give {}."""
    filled = [part for part in parts if part]
    merged = {name: np.concatenate([part[name] for part in filled]) for name in (filled[0] if filled else {})}
    if not merged:
        return TokenTable(columns={})
    order = np.lexsort((merged["token_index"], merged["sample_index"]))
    return TokenTable(columns={name: values[order] for name, values in merged.items()})


def save_token_sample(path: Path, table: TokenTable, samples: int) -> None:
    """Publish the rows of the first `samples` samples of the step, for the report."""
    keep = table["sample_index"].astype(np.int64) < samples

    def write(stream: BinaryIO) -> None:
        np.savez(stream, allow_pickle=False, **{name: values[keep] for name, values in table.columns.items()})

    publish_file(path, write)
