"""The inputs that the loss builds from a pack, teacher scores and values before the update, for tests of objectives."""

from __future__ import annotations

import torch

from tropd_mcore.library.arguments import StudentTopK, TeacherTopK
from tropd_mcore.library.checks import STATISTICS
from tropd_mcore.library.inputs import Constants
from tropd_mcore.library.shapes import TokenNumbers
from tropd_mcore.types import MicroBatch, RowContext, TeacherScores


def constants_of(micro_batch: MicroBatch, scored: TeacherScores, before: RowContext, vocab_size: int) -> Constants:
    """The arguments as `mcore.loss` passes them. The statistic is given under all three names."""
    own = None
    if before.own_ids_TL is not None:
        assert before.teacher_own_logp_TL is not None
        own = StudentTopK(before.own_ids_TL, before.teacher_own_logp_TL, before.old_own_logp_TL)
    return Constants.of(
        TeacherTopK(scored.logp_T, scored.topk_ids_TK, scored.topk_logp_TK, scored.entropy_T, scored.scored_T),
        TokenNumbers(
            target_ids_T=micro_batch.target_ids_T,
            student_mask_T=micro_batch.student_mask_T,
            prefix_mask_T=micro_batch.prefix_mask_T,
            weight_T=micro_batch.weight_T,
            trust_u_T=micro_batch.trust_u_T,
            rollout_logp_T=micro_batch.rollout_logp_T,
            old_logp_T=before.old_logp_T,
            reference_logp_T=before.reference_logp_T,
            student_topk=own,
            **dict.fromkeys(STATISTICS, before.statistic_T),
        ),
        vocab_size=vocab_size,
        dtype=torch.float64 if scored.logp_T.dtype == torch.float64 else torch.float32,
    )
