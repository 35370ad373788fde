"""Computes log-probs and top-k of the rows of micro-batches over a model's whole vocabulary, without gradients.

It serves the teacher, the student before an update, the comparison with the sampler, and evaluation. It does not
compute the loss. Invariants: all numbers refer to the full vocabulary without padding and are the same on every tensor
rank. Each function reads the output layer once.

Legend: T rows, K teacher top-k, L student top-k, J = 1 + L ids, E excluded ids, A = K + E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tropd_mcore.kernel.source import OutputLayer
from tropd_mcore.kernel.support_log_probs import support_log_probs
from tropd_mcore.kernel.topk import TopK, distributed_topk
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model, resident
from tropd_mcore.mcore.pipeline import only_measure, run_pipeline
from tropd_mcore.sentinels import ABSENT, NO_ENTRY
from tropd_mcore.types import MicroBatch, StudentPass, TeacherScores


def score_micro_batches(
    model: Model,
    micro_batches: list[MicroBatch],
    pack_length: int,
    *,
    k: int,
    settings: LossSettings,
    extra_ids: Sequence[Tensor | None] | None = None,
    keep_hidden: bool = False,
    excluded: Sequence[int] = (),
) -> list[TeacherScores | None]:
    """Score every row at temperature 1: log q of the predicted token, top-k, tail mass and entropy, in nats.

    `extra_ids[i]`, int64 [T, L], are additional ids of micro-batch i; their log q is `logp_of_student_topk_TL`. If this
    model's vocabulary lacks a predicted id, that row is not scored; if it lacks an additional id, the value is ABSENT.
    `keep_hidden` also keeps the input of the output layer, [T, D]. `excluded` ids cannot be in the top-k: the next best
    ids take their places, their probability counts as tail, and an additional id among them is ABSENT. Returns None
    for each micro-batch on all but the last stage.
    """
    kernel = settings.kernel(model, temperature=1.0)
    excluded_E = torch.tensor(excluded, dtype=torch.int64, device=model.platform.device) if excluded else None

    def measure(layer: OutputLayer, micro_batch: MicroBatch, index: int) -> TeacherScores:
        extra_TL = extra_ids[index] if extra_ids is not None else None
        ids_TJ = micro_batch.target_ids_T[:, None]
        if extra_TL is not None:
            ids_TJ = torch.cat([ids_TJ, extra_TL], dim=1)
        known_TJ = ids_TJ < model.shard.vocab_size
        if excluded_E is not None:
            known_TJ[:, 1:] &= ~torch.isin(ids_TJ[:, 1:], excluded_E)
        ids_TJ = torch.where(known_TJ, ids_TJ, NO_ENTRY)
        top = distributed_topk(settings.source(model, layer), k=k + len(excluded), kernel=kernel, ids_TJ=ids_TJ)
        excluded_T = None
        if excluded_E is not None:
            top, excluded_T = _without(top, excluded_E)
        assert top.logp_TJ is not None, "log-probs of ids were asked for"
        return TeacherScores(
            logp_T=top.logp_TJ[:, 0],
            topk_ids_TK=top.ids_TK,
            topk_logp_TK=top.logp_TK,
            tail_mass_T=top.tail_mass_T,
            entropy_T=top.entropy_T,
            scored_T=known_TJ[:, 0],
            logp_of_student_topk_TL=top.logp_TJ[:, 1:].masked_fill(~known_TJ[:, 1:], ABSENT)
            if extra_TL is not None
            else None,
            hidden_TD=layer.hidden_TD if keep_hidden else None,
            excluded_T=excluded_T,
        )

    with resident(model):
        return run_pipeline(model, micro_batches, pack_length, loss=only_measure(measure), forward_only=True)


def _without(top: TopK, excluded_E: Tensor) -> tuple[TopK, Tensor]:
    """Drop excluded ids from the A = K + E best candidates.

    Returns (the K best that are left, int32 [T] number of excluded ids among the first K of A). At least K of the A
    candidates are left, and no id outside A is better than any of them.
    """
    k = top.ids_TK.shape[1] - len(excluded_E)
    out_TA = torch.isin(top.ids_TK, excluded_E)
    kept_TK = out_TA.to(torch.uint8).argsort(dim=1, stable=True)[:, :k]  # stable: the order of the top-k stays
    logp_TK = top.logp_TK.gather(1, kept_TK)
    tail_mass_T = (1.0 - logp_TK.exp().sum(dim=1)).clamp(0.0, 1.0)
    left = replace(top, ids_TK=top.ids_TK.gather(1, kept_TK), logp_TK=logp_TK, tail_mass_T=tail_mass_T)
    return left, out_TA[:, :k].sum(dim=1, dtype=torch.int32)


def student_pass(
    model: Model, micro_batches: list[MicroBatch], pack_length: int, *, student_topk: int, settings: LossSettings
) -> list[StudentPass | None]:
    """Score every row with the student at the rollout temperature, and find its `student_topk` best candidates.

    Returns None for each micro-batch on all but the last stage.
    """
    kernel = settings.kernel(model, temperature=settings.temperature)

    def measure(layer: OutputLayer, micro_batch: MicroBatch, index: int) -> StudentPass:
        source, ids_TJ = settings.source(model, layer), micro_batch.target_ids_T[:, None]
        if student_topk == 0:
            logp_TJ, entropy_T = support_log_probs(source, ids_TJ, kernel, unique_run_lengths=(1,))
            nothing_TL = logp_TJ[:, :0]
            return StudentPass(logp_TJ[:, 0], entropy_T, nothing_TL.to(torch.int64), nothing_TL)
        top = distributed_topk(source, k=student_topk, kernel=kernel, ids_TJ=ids_TJ)
        assert top.logp_TJ is not None, "log-probs of ids were asked for"
        return StudentPass(top.logp_TJ[:, 0], top.entropy_T, top.ids_TK, top.logp_TK)

    return run_pipeline(model, micro_batches, pack_length, loss=only_measure(measure), forward_only=True)


def sampled_log_probs(
    model: Model, micro_batches: list[MicroBatch], pack_length: int, *, settings: LossSettings
) -> list[Tensor | None]:
    """Return log p of the predicted token of every row at `settings.temperature`, float32 [T] nats.

    Returns None for each micro-batch on all but the last stage.
    """
    passes = student_pass(model, micro_batches, pack_length, student_topk=0, settings=settings)
    return [found.logp_T if found is not None else None for found in passes]
