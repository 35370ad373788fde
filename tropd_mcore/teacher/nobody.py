"""The scorer of an objective that reads no number of the teacher: every row counts, and nothing is known of it.

Invariant: an unknown number is NaN and never a number that could be taken for one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tropd_mcore.data.packing import PackedStep
from tropd_mcore.data.verdicts import Verdict
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.types import MicroBatch, Rollout, TeacherScores


class NoTeacher:
    """Blank scores without candidates, on the last stage."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def score(
        self,
        rollouts: list[Rollout],
        packed: PackedStep,
        own_ids: Sequence[Tensor | None],
        verdicts: Sequence[Verdict],
    ) -> list[TeacherScores | None]:
        """Return the blank scores of each micro-batch; None on all but the last stage."""
        if not self._layout.is_last_stage:
            return [None] * len(packed.micro_batches)
        return [_blank(micro_batch) for micro_batch in packed.micro_batches]


def _blank(micro_batch: MicroBatch) -> TeacherScores:
    rows_T = micro_batch.target_ids_T
    unknown_T = torch.full_like(rows_T, torch.nan, dtype=torch.float32)
    return TeacherScores(
        logp_T=unknown_T,
        topk_ids_TK=rows_T.new_empty(len(rows_T), 0),
        topk_logp_TK=unknown_T.new_empty(len(rows_T), 0),
        tail_mass_T=unknown_T,
        entropy_T=None,
        scored_T=torch.ones_like(rows_T, dtype=torch.bool),
    )
