"""Local support matching in NeMo-RL: a loss function of logits that replaces `DistillationLossFn(loss_config)`.

Logits are [B, S, V / TP], already divided by the temperature. Data has input_ids, token_mask, sample_mask, and the
teacher's top-k logits and ids per position [B, S, K]. They come without their normaliser, so only a renormalised
divergence is correct: KL(p~ || q~), both on the teacher's top-k. TrOPD needs the true log q (see nemo_rl_full.py). With
packing, the loss is called per sequence on slices of the logits and leaves them unchanged. Context parallelism is 1.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from tropd_mcore import TeacherTopK, VocabParallel, distill_loss, objectives


class LocalSupportMatching:
    """The loss over the student's tokens, divided by the number of tokens in the whole batch, as NeMo-RL expects.

    It is created on the driver and called in the workers. `group` defaults to Megatron's tensor-parallel group there.
    """

    def __init__(self, vocab_size: int, group: ProcessGroup | None = None) -> None:
        self._vocab_size, self._group = vocab_size, group

    loss_type = property(lambda self: import_module("nemo_rl.algorithms.loss.interfaces").LossType.TOKEN_LEVEL)
    input_type = property(lambda self: import_module("nemo_rl.algorithms.loss.interfaces").LossInputType.LOGIT)

    def __call__(
        self, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor, logits: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return (loss, numbers to report)."""
        group = self._group or import_module("megatron.core.parallel_state").get_tensor_model_parallel_group()
        length, logq = data["input_ids"].shape[1], data["teacher_topk_logits"].float().log_softmax(-1)
        mask = F.pad((data["token_mask"] * data["sample_mask"][:, None])[:, 1:], (0, 1)) > 0
        teacher = TeacherTopK(ids_TK=data["teacher_topk_indices"], logp_TK=logq)
        given: Any = {"vp": VocabParallel(group, self._vocab_size), "student_mask_T": mask, "preserve_logits": True}
        out = distill_loss(logits[:, :length], None, teacher, objectives.lsm(), **given)
        loss = out.loss_sum / (global_valid_toks + 1e-8)
        return loss, {"loss": float(out.value / global_valid_toks), "num_valid_samples": len(mask)}
