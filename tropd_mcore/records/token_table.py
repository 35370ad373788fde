"""Collects the per-token results of a step from all ranks into one table on rank 0.

Invariant: the table does not depend on the parallel layout, the packing or the micro-batch split, because rows are
sorted by sample, token and epoch.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

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
    """Return this rank's rows of one update as numpy columns, [rows of its micro-batches].

    Costs one copy to the host per column.
    """
    old_logp = [
        context.old_logp_T if context is not None and context.old_logp_T is not None else output["student_logp"]
        for context, output in zip(contexts, outputs, strict=True)
    ]
    where = {
        "sample_index": [micro_batch.sample_index_T for micro_batch in micro_batches],
        "token_index": [micro_batch.token_index_T for micro_batch in micro_batches],
        "epoch": [torch.full_like(micro_batch.token_index_T, epoch) for micro_batch in micro_batches],
        "rollout_logp": [micro_batch.rollout_logp_T for micro_batch in micro_batches],
        "old_logp": old_logp,
    }
    what = {name: [output[name] for output in outputs] for name in (outputs[0] if outputs else {})}
    return {name: torch.cat(pieces).cpu().numpy() for name, pieces in {**where, **what}.items()}


def merge_columns(parts: Sequence[NumpyColumns]) -> TokenTable:
    """Merge the columns of all ranks and updates. Ranks without rows (other stages, tensor rank > 0) pass {}."""
    filled = [part for part in parts if part]
    merged = {name: np.concatenate([part[name] for part in filled]) for name in (filled[0] if filled else {})}
    if not merged:
        return TokenTable(columns={})
    order = np.lexsort((merged["epoch"], merged["token_index"], merged["sample_index"]))
    return TokenTable(columns={name: values[order] for name, values in merged.items()})
