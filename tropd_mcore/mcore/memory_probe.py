"""Runs forward and backward of the longest possible pack before any rollout, so a lack of memory shows at the start.

This module does not measure memory. Invariant: parameters and optimizer are unchanged, and gradients are zero
afterwards.
"""

from __future__ import annotations

import numpy as np
import torch

from tropd_mcore.data.packing import one_sample, pack_multiple
from tropd_mcore.errors import GateError
from tropd_mcore.mcore.loss import make_distillation_loss
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.pipeline import run_pipeline, zero_gradients
from tropd_mcore.objectives.catalogue import Objective
from tropd_mcore.types import MicroBatch, RowContext, TeacherScores


def probe_memory(
    model: Model,
    objective: Objective,
    settings: LossSettings,
    *,
    tokens_per_micro_batch: int,
    k: int,
    student_topk: int = 0,
    teacher: Model | None = None,
) -> None:
    """Run as many full packs as the pipeline holds at once; each is one sample with every token supervised.

    `tokens_per_micro_batch` counts positions over all context ranks. `k` and `student_topk` are the sizes of the
    teacher's and the student's top-k. `teacher` is needed for a divergence over the whole vocabulary. Raises GateError
    if GPU memory runs out, and ConfigError if the settings would give a wrong gradient.
    """
    layout = model.layout
    multiple = pack_multiple(layout.cp_size, layout.tp_size)
    pack_length = max(1, tokens_per_micro_batch // multiple) * multiple
    micro_batch = longest_micro_batch(pack_length, layout, model.platform.device)
    count = layout.pp_size * min(layout.vpp_size, 2)
    scores = [_any_scores(micro_batch, k, student_topk, teacher)] * count
    context = [_any_context(scores[0])] * count
    loss = make_distillation_loss(model, objective, scores, context, settings, teacher=teacher)
    try:
        run_pipeline(model, [micro_batch] * count, pack_length, loss=loss, forward_only=False)
    except torch.OutOfMemoryError as error:
        raise GateError(
            f"gates.longest_sequence: out of memory on rank {layout.rank} with a pack of {pack_length} tokens; lower "
            "batch.tokens_per_micro_batch, or raise parallel.tensor or parallel.context, or set student.recompute=full"
        ) from error
    zero_gradients(model)


def longest_micro_batch(pack_length: int, layout: Layout, device: torch.device) -> MicroBatch:
    """Return this context rank's part of one sample of `pack_length` positions, in which every position is a row."""
    tokens = np.zeros(pack_length + 1, dtype=np.int64)
    return one_sample(tokens, pack_length, device, cp_size=layout.cp_size, cp_rank=layout.cp_rank)


def _any_scores(micro_batch: MicroBatch, k: int, student_topk: int, teacher: Model | None) -> TeacherScores:
    """Return scores of a teacher that gives the first k tokens of the vocabulary equal probability."""
    rows, device = len(micro_batch.rows_T), micro_batch.rows_T.device
    logp_T = torch.full((rows,), -float(np.log(max(k, 1))), device=device)
    hidden_TD = None
    if teacher is not None:
        hidden_TD = torch.zeros(rows, teacher.arch.hidden_size, dtype=teacher.config.params_dtype, device=device)
    return TeacherScores(
        logp_T=logp_T,
        topk_ids_TK=torch.arange(k, device=device).expand(rows, k),
        topk_logp_TK=logp_T[:, None].expand(rows, k),
        tail_mass_T=torch.zeros_like(logp_T),
        entropy_T=-logp_T,
        scored_T=torch.ones_like(logp_T, dtype=torch.bool),
        logp_of_student_topk_TL=logp_T[:, None].expand(rows, student_topk),
        hidden_TD=hidden_TD,
    )


def _any_context(scores: TeacherScores) -> RowContext:
    """Return the context of a student with the same top-k ids and log-probs as the teacher of `scores`."""
    assert scores.logp_of_student_topk_TL is not None
    rows, student_topk = scores.logp_of_student_topk_TL.shape
    return RowContext(
        own_ids_TL=torch.arange(student_topk, device=scores.logp_of_student_topk_TL.device).expand(rows, student_topk),
        teacher_own_logp_TL=scores.logp_of_student_topk_TL,
    )
