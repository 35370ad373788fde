"""Model-Optimizer: the two logit losses of its Megatron distillation plugin.

Their callers are the loss functions of Megatron-LM's post-training and of Megatron-Bridge. They sum a loss marked
`tp_reduce` over the tensor ranks in place, which autograd does not see, and do not sum the other. So does the adapter.

Shapes: T tokens, W vocabulary shard of this rank, K teacher top-k.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.conformance.adapters.checkout import checkout
from tropd_mcore.conformance.adapters.inputs import (
    PADDING_LOGIT,
    megatron_tensor_group,
    student_logits,
    summed,
    teacher_logits,
)
from tropd_mcore.conformance.peers import PeerCase, covers

COMMIT = "a2fbac7bad8a"
MODULE = "modelopt.torch.distill.plugins.megatron"
IMPORTS = ("modelopt.torch.distill", "modelopt.torch.distill.config")


@covers("gkd/fkl-full", "gkd/rkl-full", dtypes=("float32", "bfloat16"))
def full_kl(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """`LogitsKLLoss`."""
    module = checkout("modelopt", root, COMMIT).load(MODULE, absent=IMPORTS)
    loss = module.LogitsKLLoss(_model_config(case), reverse=case.name == "gkd/rkl-full")
    return _called(loss, case, teacher_logits(case))


@covers("gkd/fkl-renorm", "gkd/rkl-renorm", without=("uneven",), dtypes=("float32", "bfloat16"))
def topk_kl(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """`TopKLogitsKLLoss`. It selects the teacher's top-k itself, so it gets teacher logits that have this top-k."""
    module = checkout("modelopt", root, COMMIT).load(MODULE, absent=IMPORTS)
    topk = case.topk_ids_TK.shape[1]
    loss = module.TopKLogitsKLLoss(_model_config(case), reverse=case.name == "gkd/rkl-renorm", top_k=topk)
    columns_W = torch.arange(case.vocab_start, case.vocab_stop)
    here_TKW = case.topk_ids_TK[:, :, None] == columns_W
    chosen_TW = torch.where(here_TKW, case.teacher_topk_logp_TK[:, :, None], 0.0).sum(dim=1)
    return _called(loss, case, chosen_TW.masked_fill(~here_TKW.any(dim=1), PADDING_LOGIT))


def _called(loss: Any, case: PeerCase, teacher_TW: Tensor) -> Tensor:
    with megatron_tensor_group(case.group):
        kl_1T, reduce_over_ranks, _ = loss(student_logits(case)[:, None], teacher_TW[:, None])
    total = summed(case, kl_1T[0])
    if reduce_over_ranks:
        dist.all_reduce(total, group=case.group)
    return total


def _model_config(case: PeerCase) -> SimpleNamespace:
    return SimpleNamespace(tensor_model_parallel_size=case.group.size(), sequence_parallel=False)
