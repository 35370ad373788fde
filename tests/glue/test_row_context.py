"""The values that the passes before the first update give to the loss, with and without student candidates."""

from __future__ import annotations

import pytest
import torch

from tests.row_constants import constants_of
from tests.unit.test_packing import make_rollout, options
from tropd_mcore.data.packing import pack
from tropd_mcore.train.batch_context import _row_context
from tropd_mcore.types import StudentPass, TeacherScores

K, VOCABULARY = 3, 300


@pytest.mark.parametrize("candidates", [0, 2])
def test_the_row_context_asks_the_teacher_about_student_candidates_only_if_there_are_any(candidates: int) -> None:
    (batch, *_) = pack([make_rollout(0, 3, 0, 5, False)], **options()).micro_batches
    rows = len(batch.rows_T)
    ids_TL = torch.arange(candidates).expand(rows, candidates)
    found = StudentPass(torch.full((rows,), -2.0), torch.ones(rows), ids_TL, torch.full((rows, candidates), -3.0))
    scores = TeacherScores(
        logp_T=torch.full((rows,), -1.0),
        topk_ids_TK=torch.arange(K).expand(rows, K),
        topk_logp_TK=torch.full((rows, K), -2.0),
        tail_mass_T=torch.zeros(rows),
        entropy_T=None,
        scored_T=torch.ones(rows, dtype=torch.bool),
        logp_of_student_topk_TL=torch.full((rows, candidates), -4.0) if candidates else None,
    )
    context = _row_context(found, scores, None, None)
    assert (context.own_ids_TL is None) == (context.old_own_logp_TL is None) == (candidates == 0)
    constants = constants_of(batch, scores, context, VOCABULARY)
    assert torch.equal(constants.columns["old_logp_T"], found.logp_T)
    assert torch.equal(constants.own_ids_TL, ids_TL)
    assert constants.columns["teacher_own_logp_TL"].shape == (rows, candidates)
    assert constants.unique_run_lengths == ((1, K, candidates) if candidates else (1, K))
