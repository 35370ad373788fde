"""Local support matching in NeMo-RL: a loss function of logits, in the place of `DistillationLossFn(loss_config)`.

Logits are [B, S, V / TP], divided by the temperature already; data has input_ids, token_mask and sample_mask, and the
teacher's top-k logits and ids of each position [B, S, K]. These come without their normaliser, so that only a
renormalised divergence is right: KL(p~ || q~), both on the teacher's top-k. TrOPD needs true log q (nemo_rl_full.py).
Packing calls once per sequence on slices of the logits, which are kept for that. Context parallelism is 1.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from tropd_mcore import TeacherTopK, VocabParallel, distill_loss, objectives


class LocalSupportMatching:
    """The loss of the student's tokens, divided by the tokens of the whole batch, as NeMo-RL expects.

    It is made on the driver and called in the workers; `group` is Megatron's tensor-parallel group there unless given.
    """

    def __init__(self, vocab_size: int, group: ProcessGroup | None = None) -> None:
        self._vocab_size, self._group = vocab_size, group

    loss_type = property(lambda self: import_module("nemo_rl.algorithms.loss.interfaces").LossType.TOKEN_LEVEL)
    input_type = property(lambda self: import_module("nemo_rl.algorithms.loss.interfaces").LossInputType.LOGIT)

    def __call__(
        self, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor, logits: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss, numbers to report)."""
        group = self._group or import_module("megatron.core.parallel_state").get_tensor_model_parallel_group()
        length, logq = data["input_ids"].shape[1], data["teacher_topk_logits"].float().log_softmax(-1)
        mask = F.pad((data["token_mask"] * data["sample_mask"][:, None])[:, 1:], (0, 1)) > 0
        teacher = TeacherTopK(ids_TK=data["teacher_topk_indices"], logp_TK=logq)
        given: Any = {"vp": VocabParallel(group, self._vocab_size), "student_mask_T": mask, "preserve_logits": True}
        out = distill_loss(logits[:, :length], None, teacher, objectives.lsm(), **given)
        loss = out.loss_sum / (global_valid_toks + 1e-8)
        return loss, {"loss": float(out.value / global_valid_toks), "num_valid_samples": len(mask)}
