"""What a model says of the rows of micro-batches: log-probs and top-k over its whole vocabulary, without gradients.

For the teacher, for the comparison with the sampler and for evaluation; not for the loss. Invariant: all numbers are of
the full vocabulary without its padding, and are the same on every tensor rank.

Legend: T rows, W vocabulary shard, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropd_mcore.losses.support import NO_ENTRY, support_log_probs
from tropd_mcore.losses.topk import distributed_topk
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.pipeline import only_measure, run_pipeline
from tropd_mcore.types import MicroBatch, TeacherScores


def score_micro_batches(
    model: Model,
    micro_batches: list[MicroBatch],
    pack_length: int,
    *,
    k: int,
    chunk_tokens: int,
    temperature: float = 1.0,
) -> list[TeacherScores | None]:
    """Score every row: log q of the predicted token, top-k, tail mass and entropy, in nats at `temperature`.

    A predicted id that this model's vocabulary does not have is not scored. None on all but the last stage.
    """

    def measure(logits_TW: Tensor, micro_batch: MicroBatch, index: int) -> TeacherScores:
        known_T = micro_batch.target_ids < model.shard.vocab_size
        target_ids_T = torch.where(known_T, micro_batch.target_ids, NO_ENTRY)
        top = distributed_topk(
            logits_TW,
            k=k,
            shard=model.shard,
            group=model.layout.groups.tp,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
        )
        return TeacherScores(
            logp_T=_log_probs(model, logits_TW, target_ids_T, chunk_tokens, temperature),
            topk_ids_TK=top.ids_TK,
            topk_logp_TK=top.logp_TK,
            tail_mass_T=top.tail_mass_T,
            entropy_T=top.entropy_T,
            scored_T=known_T,
        )

    return run_pipeline(model, micro_batches, pack_length, loss=only_measure(measure), forward_only=True)


def sampled_log_probs(
    model: Model, micro_batches: list[MicroBatch], pack_length: int, *, chunk_tokens: int, temperature: float = 1.0
) -> list[Tensor | None]:
    """Return log p of the predicted token of every row, float32 [T] nats; None on all but the last stage."""

    def measure(logits_TW: Tensor, micro_batch: MicroBatch, index: int) -> Tensor:
        return _log_probs(model, logits_TW, micro_batch.target_ids, chunk_tokens, temperature)

    return run_pipeline(model, micro_batches, pack_length, loss=only_measure(measure), forward_only=True)


def _log_probs(model: Model, logits_TW: Tensor, ids_T: Tensor, chunk_tokens: int, temperature: float) -> Tensor:
    logp_TJ, _ = support_log_probs(
        logits_TW,
        ids_T[:, None],
        shard=model.shard,
        group=model.layout.groups.tp,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    return logp_TJ[:, 0]
