"""The per-token results of a step, from the ranks that computed them to one table on rank 0.

Invariant: the table does not depend on the parallel layout, the packing or the micro-batch split: rows are ordered by
sample, token and epoch.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from tropd_mcore.evaluation.run_records import VERDICTS
from tropd_mcore.files import publish_file
from tropd_mcore.types import MicroBatch, RowContext, TokenTable

Columns = Mapping[str, torch.Tensor]
NumpyColumns = dict[str, np.ndarray]


def local_columns(
    micro_batches: Sequence[MicroBatch],
    contexts: Sequence[RowContext | None],
    outputs: Sequence[Columns],
    *,
    epoch: int,
) -> NumpyColumns:
    """This rank's rows of one update as numpy columns, [rows of its micro-batches]; one copy to the host a column."""
    old_logp = [
        context.old_logp_T if context is not None and context.old_logp_T is not None else output["student_logp"]
        for context, output in zip(contexts, outputs, strict=True)
    ]
    where = {
        "sample_index": [micro_batch.sample_index for micro_batch in micro_batches],
        "token_index": [micro_batch.token_index for micro_batch in micro_batches],
        "epoch": [torch.full_like(micro_batch.token_index, epoch) for micro_batch in micro_batches],
        "behav_logp": [micro_batch.behav_logp for micro_batch in micro_batches],
        "old_logp": old_logp,
    }
    what = {name: [output[name] for output in outputs] for name in (outputs[0] if outputs else {})}
    return {name: torch.cat(pieces).cpu().numpy() for name, pieces in {**where, **what}.items()}


def merge_columns(parts: Sequence[NumpyColumns]) -> TokenTable:
    """One table of the columns of all ranks and updates; those without rows (other stages, tensor rank > 0) give {}."""
    filled = [part for part in parts if part]
    merged = {name: np.concatenate([part[name] for part in filled]) for name in (filled[0] if filled else {})}
    if not merged:
        return TokenTable(columns={})
    order = np.lexsort((merged["epoch"], merged["token_index"], merged["sample_index"]))
    return TokenTable(columns={name: values[order] for name, values in merged.items()})


def save_token_sample(
    path: Path, table: TokenTable, samples: int, verdicts: Sequence[bool | None] | None = None
) -> None:
    """Publish the rows of `samples` samples of the step, as the first epoch saw them, for the report.

    The samples are spread evenly over the step, so that they are of several prompts. `verdicts` says of every sample
    of the step whether it is right, None where that was not judged.
    """
    there = np.unique(table["sample_index"].astype(np.int64))
    spread = there[np.linspace(0, len(there) - 1, min(samples, len(there))).round().astype(np.int64)]
    keep = np.isin(table["sample_index"], spread) & (table["epoch"] == 0)
    columns = {name: values[keep] for name, values in table.columns.items()}
    if verdicts is not None:
        columns[VERDICTS] = np.array([-1 if verdict is None else int(verdict) for verdict in verdicts], dtype=np.int8)

    archive = io.BytesIO()  # numpy tells a full disk as another error
    np.savez(archive, allow_pickle=False, **columns)
    publish_file(path, lambda stream: stream.write(archive.getbuffer()))
