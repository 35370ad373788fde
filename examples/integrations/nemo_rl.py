"""Local support matching in NeMo-RL: a LossFunction of logits, for `input_type = LossInputType.LOGIT`.

Logits are [B, S, V / TP], divided by the temperature already; data has input_ids, token_mask and sample_mask, and the
teacher's top-k logits and ids of each position [B, S, K]. These come without their normaliser, so that only a
renormalised divergence is right: KL(p~ || q~), both on the teacher's top-k. TrOPD needs true log q. Megatron's cross
entropy may read the same logits later, and packing calls once per sequence on slices of them.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from tropd_mcore import TeacherTopK, VocabParallel, distill_loss, objectives


class LocalSupportMatching:
    """The loss of the student's tokens, divided by the tokens of the whole batch, as NeMo-RL expects."""

    def __init__(self, vocab_size: int, group: ProcessGroup) -> None:
        self._vp = VocabParallel(group, vocab_size)

    def __call__(
        self, data: dict[str, Tensor], global_valid_seqs: Tensor, global_valid_toks: Tensor, logits: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss, numbers to report)."""
        tokens = data["input_ids"]
        mask = data["token_mask"] * data["sample_mask"][:, None]
        out = distill_loss(
            logits[:, : tokens.shape[1]],
            None,
            TeacherTopK(
                ids_TK=data["teacher_topk_indices"], logp_TK=data["teacher_topk_logits"].float().log_softmax(-1)
            ),
            objectives.lsm(),
            vp=self._vp,
            student_mask_T=F.pad(mask[:, 1:], (0, 1)) > 0,
            preserve_logits=True,
        )
        loss = out.loss_sum / (global_valid_toks + 1e-8)
        return loss, {"loss": float(out.value / global_valid_toks), "num_valid_samples": len(tokens)}
