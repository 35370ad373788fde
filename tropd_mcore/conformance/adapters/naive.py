"""The naive implementation: gather the whole vocabulary on every rank and use autograd.

It needs no checkout. Every rank holds the logits of the whole vocabulary several times in memory.

Shapes: T tokens, W vocabulary shard of this rank, V vocabulary, K teacher top-k.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tropd_mcore.conformance.adapters.inputs import CompositeInputs, student_logits, summed, topk_forward_kl
from tropd_mcore.conformance.peers import PeerCase, covers


@covers("log_prob", "entropy", "gkd/fkl-truncated", without=("uneven",), dtypes=("float64", "float32"))
def autograd(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """log_softmax of the gathered logits."""
    logp_TV = _gathered(student_logits(case), case.group).log_softmax(dim=1)
    if case.name == "log_prob":
        return summed(case, -_sampled(logp_TV, case.target_ids_T))
    if case.name == "entropy":
        return summed(case, -_entropy(logp_TV))
    return summed(case, topk_forward_kl(case.teacher_topk_logp_TK, logp_TV.gather(1, case.topk_ids_TK)))


def composite(inputs: CompositeInputs, *, root: Path | None = None) -> Tensor:
    """All three terms from one log_softmax of the gathered logits."""
    logp_TV = _gathered(inputs.logits_TW.float(), inputs.group).log_softmax(dim=1)
    kl_T = topk_forward_kl(inputs.topk_logp_TK, logp_TV.gather(1, inputs.topk_ids_TK))
    return inputs.total(_sampled(logp_TV, inputs.target_ids_T), kl_T, _entropy(logp_TV))


def _gathered(logits_TW: Tensor, group: ProcessGroup) -> Tensor:
    """[T, V]. Only this rank's columns keep their autograd history, as Megatron's replicas of the loss require."""
    shards = [torch.empty_like(logits_TW) for _ in range(group.size())]
    dist.all_gather(shards, logits_TW.detach().contiguous(), group=group)
    shards[group.rank()] = logits_TW
    return torch.cat(shards, dim=1)


def _sampled(logp_TV: Tensor, ids_T: Tensor) -> Tensor:
    return logp_TV.gather(1, ids_T[:, None])[:, 0]


def _entropy(logp_TV: Tensor) -> Tensor:
    return -(logp_TV.exp() * logp_TV).sum(dim=1)
