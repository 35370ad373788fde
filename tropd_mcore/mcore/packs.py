"""Packs of a step for this rank's place in a layout.

How samples are packed is in `data.packing`, which knows no layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tropd_mcore.data.packing import NOTHING_IGNORED, IgnoredTokens, PackedStep, pack
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.types import Rollout


def pack_on(
    layout: Layout,
    rollouts: Sequence[Rollout],
    *,
    tokens_per_micro_batch: int,
    device: torch.device | str,
    aggregation: str = "token_mean",
    prefix_denominator: str = "joint",
    mini_batches: Sequence[range] = (),
    ignored: IgnoredTokens = NOTHING_IGNORED,
) -> PackedStep:
    """Return the micro-batches of this rank; the other arguments are those of `data.packing.pack`.

    An interleaved schedule gets a multiple of the pipeline's size.
    """
    return pack(
        rollouts,
        tokens_per_micro_batch=tokens_per_micro_batch,
        dp_size=layout.dp_size,
        dp_rank=layout.dp_rank,
        cp_size=layout.cp_size,
        cp_rank=layout.cp_rank,
        tp_size=layout.tp_size,
        aggregation=aggregation,
        prefix_denominator=prefix_denominator,
        device=device,
        micro_batch_multiple=layout.pp_size if layout.vpp_size > 1 else 1,
        mini_batches=mini_batches,
        ignored=ignored,
    )
