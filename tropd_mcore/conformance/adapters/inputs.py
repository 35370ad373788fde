"""Shared by the adapters: a case in the form that a trainer passes to its loss, and the sum that they all return.

The benchmarks measure the composite: the three terms of trust-region distillation that need the vocabulary.

Shapes: T tokens, W vocabulary shard of this rank, K teacher top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tropd_mcore.conformance.peers import PeerCase

PADDING_LOGIT = -1e4
"""Adapters write this over padding columns. The peers' functions take no vocabulary size, so to them every column is a
token. e^-10000 is 0 in every dtype, and with finite logits 0 x logit is 0."""


@dataclass(frozen=True)
class CompositeInputs:
    """One rank's inputs of sum_t -advantage log p(x) + sum_K q (log q - log p) - entropy_weight H(p)."""

    logits_TW: Tensor
    """requires grad; W is the same on all ranks, no column is padding"""
    group: ProcessGroup
    target_ids_T: Tensor
    topk_ids_TK: Tensor
    topk_logp_TK: Tensor
    """log q, float32"""
    advantage_T: Tensor
    entropy_weight_T: Tensor
    chunk_tokens: int
    """for peers that compute in chunks"""

    @property
    def vocab_start(self) -> int:
        """First column of this shard."""
        return self.group.rank() * self.logits_TW.shape[1]

    def total(self, logp_T: Tensor, divergence_T: Tensor | None, entropy_T: Tensor) -> Tensor:
        """Return the sum over tokens, without the divergence if the peer has none."""
        loss_T = -self.advantage_T * logp_T - self.entropy_weight_T * entropy_T
        return (loss_T if divergence_T is None else loss_T + divergence_T).sum()


def student_logits(case: PeerCase) -> Tensor:
    """cap(z) / temperature with padding columns at PADDING_LOGIT, [T, W]; a new tensor that a peer may change in place.

    A softcap is part of a model's output layer, and trainers divide by the rollout temperature before their loss.
    """
    return _without_padding(_scaled(case.logits_TW, case.softcap, case.temperature), case)


def teacher_logits(case: PeerCase) -> Tensor:
    """cap(z) of the teacher with padding columns at PADDING_LOGIT, [T, W]."""
    return _without_padding(_scaled(case.teacher_logits_TW, case.softcap, 1.0), case)


def counted(case: PeerCase) -> Tensor:
    """The tokens with a loss, bool [T]: the student's, and for the elementary objectives also the teacher's."""
    return case.student_mask_T if case.name.startswith("gkd") else case.student_mask_T | case.prefix_mask_T


def summed(case: PeerCase, loss_T: Tensor) -> Tensor:
    """Sum of weight x loss over the tokens with a loss."""
    return (case.weight_T * loss_T.masked_fill(~counted(case), 0.0)).sum()


def topk_forward_kl(topk_logp_TK: Tensor, student_topk_logp_TK: Tensor) -> Tensor:
    """sum_K q (log q - log p), [T], for peers that return log-probs and leave the divergence to the caller."""
    return (topk_logp_TK.exp() * (topk_logp_TK - student_topk_logp_TK)).sum(dim=-1)


@contextmanager
def megatron_tensor_group(group: ProcessGroup) -> Iterator[None]:
    """Within the block, Megatron's tensor-parallel group is `group`, for peers that ask Megatron for the group."""
    from megatron.core import parallel_state

    # All of Megatron's tensor-parallel getters read this variable. Megatron's own initialisation would make groups of
    # all kinds on all ranks of the job, which may be more ranks than share this vocabulary.
    with mock.patch.object(parallel_state, "_TENSOR_MODEL_PARALLEL_GROUP", group):
        yield


def _scaled(logits_TW: Tensor, softcap: float | None, temperature: float) -> Tensor:
    """Scaled in float32 for bfloat16 logits, so that nothing is rounded twice; unchanged without scaling."""
    if softcap is None and temperature == 1.0:
        return logits_TW
    wide_TW = logits_TW.float() if logits_TW.dtype == torch.bfloat16 else logits_TW
    return (wide_TW if softcap is None else softcap * torch.tanh(wide_TW / softcap)) / temperature


def _without_padding(logits_TW: Tensor, case: PeerCase) -> Tensor:
    columns_W = torch.arange(case.vocab_start, case.vocab_stop, device=logits_TW.device)
    return logits_TW.masked_fill(columns_W >= case.vocab_size, PADDING_LOGIT)
