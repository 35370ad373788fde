"""What adapters share: a case in the form that a trainer hands to its loss, and the sum that they all return.

The composite is what the benchmarks measure: the three terms of trust-region distillation that need the vocabulary.

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
"""What an adapter writes over padding columns: the peers' functions take no vocabulary size, so that a column of any
value is a token to them. e^-10000 is 0 in every dtype, and finite logits keep 0 x logit at 0."""


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
    """for peers that work in chunks"""

    @property
    def vocab_start(self) -> int:
        """First column of this shard."""
        return self.group.rank() * self.logits_TW.shape[1]

    def total(self, logp_T: Tensor, divergence_T: Tensor | None, entropy_T: Tensor) -> Tensor:
        """Return the sum over tokens; without the divergence where a peer has none."""
        loss_T = -self.advantage_T * logp_T - self.entropy_weight_T * entropy_T
        return (loss_T if divergence_T is None else loss_T + divergence_T).sum()


def student_logits(case: PeerCase) -> Tensor:
    """cap(z) / temperature with padding columns at PADDING_LOGIT, [T, W]; a tensor of its own, which a peer may change.

    A softcap is part of a model's output layer, and trainers divide by the rollout's temperature before their loss.
    """
    return _without_padding(_scaled(case.logits_TW, case.softcap, case.temperature), case)


def teacher_logits(case: PeerCase) -> Tensor:
    """cap(z) of the teacher with padding columns at PADDING_LOGIT, [T, W]."""
    return _without_padding(_scaled(case.teacher_logits_TW, case.softcap, 1.0), case)


def counted(case: PeerCase) -> Tensor:
    """The tokens that have a loss, bool [T]: the student's, and for the elementary objectives the teacher's too."""
    return case.student_mask_T if case.name.startswith("gkd") else case.student_mask_T | case.prefix_mask_T


def summed(case: PeerCase, loss_T: Tensor) -> Tensor:
    """Weight x loss over the tokens that have one."""
    return (case.weight_T * loss_T.masked_fill(~counted(case), 0.0)).sum()


def topk_forward_kl(topk_logp_TK: Tensor, student_topk_logp_TK: Tensor) -> Tensor:
    """sum_K q (log q - log p), [T], for peers that give log-probs and leave the divergence to the caller."""
    return (topk_logp_TK.exp() * (topk_logp_TK - student_topk_logp_TK)).sum(dim=-1)


@contextmanager
def megatron_tensor_group(group: ProcessGroup) -> Iterator[None]:
    """Within the block, Megatron's tensor-parallel group is `group`: for peers that ask Megatron for it."""
    from megatron.core import parallel_state

    # The one place that all of Megatron's tensor-parallel getters read. Megatron's own initialisation makes groups of
    # all kinds on all ranks of the job, which may be more than those that share this vocabulary.
    with mock.patch.object(parallel_state, "_TENSOR_MODEL_PARALLEL_GROUP", group):
        yield


def _scaled(logits_TW: Tensor, softcap: float | None, temperature: float) -> Tensor:
    """In float32 for bfloat16 logits, so that nothing is rounded twice; untouched where there is nothing to do."""
    if softcap is None and temperature == 1.0:
        return logits_TW
    wide_TW = logits_TW.float() if logits_TW.dtype == torch.bfloat16 else logits_TW
    return (wide_TW if softcap is None else softcap * torch.tanh(wide_TW / softcap)) / temperature


def _without_padding(logits_TW: Tensor, case: PeerCase) -> Tensor:
    columns_W = torch.arange(case.vocab_start, case.vocab_stop, device=logits_TW.device)
    return logits_TW.masked_fill(columns_W >= case.vocab_size, PADDING_LOGIT)
