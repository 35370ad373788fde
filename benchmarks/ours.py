"""Our loss as the benchmarks call it: K1 policy gradient + top-k forward KL + entropy.

`ours` calls the kernel. `door` calls the public `distill_loss` with the same loss as a custom objective.

Shapes: N tokens, W vocabulary shard of this rank, C tokens of a chunk, k teacher top-k, J = 1 + k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.inputs import Tokens
from tropd_mcore import TeacherTopK, VocabParallel, distill_loss, objectives
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.source import LogitSource
from tropd_mcore.kernel.support_loss import TokenLoss, WeightGradientMode, support_loss
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.parts.divergences import topk_forward_kl


def token_loss(tokens: Tokens) -> TokenLoss:
    """Return the loss -A log p(x) + (sum over the teacher's top-k of q (log q - log p)) - c H of each token."""

    def loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
        loss_C = -tokens.advantage_T[rows] * logp_CJ[:, 0] - tokens.entropy_weight_T[rows] * entropy_C
        if logp_CJ.shape[1] > 1:
            loss_C = loss_C + topk_forward_kl(logp_CJ[:, 1:], tokens.topk_logp_TK[rows], norm="truncated")
        return TokenLosses(loss_C, torch.ones_like(loss_C, dtype=torch.bool))

    return loss


def ours(source: LogitSource, tokens: Tokens, kernel: Kernel, *, weight_gradient: WeightGradientMode) -> Tensor:
    """Return the loss sum. Its backward pass gives the gradients of `source`."""
    ids_TJ = torch.cat([tokens.target_T[:, None], tokens.topk_ids_TK], dim=1)
    k = tokens.topk_ids_TK.shape[1]
    return support_loss(
        source, ids_TJ, token_loss(tokens), kernel, unique_run_lengths=(1, k), weight_gradient=weight_gradient
    ).loss_sum


def door(logits_TW: Tensor, tokens: Tokens, vp: VocabParallel) -> Tensor:
    """Return the same sum from `distill_loss`, with logits [1, N, W] as in other training stacks."""
    out = distill_loss(
        logits_TW[None],
        tokens.target_T[None],
        TeacherTopK(torch.zeros_like(tokens.advantage_T)[None], tokens.topk_ids_TK[None], tokens.topk_logp_TK[None]),
        objectives.custom(_at_the_door, needs=("advantage_T",), entropy_weight=float(tokens.entropy_weight_T[0])),
        vp=vp,
        advantage_T=tokens.advantage_T[None],
    )
    return out.loss_sum


def _at_the_door(inputs: TokenInputs, *, entropy_weight: float) -> TokenLosses:
    loss_T = -inputs.advantage_T * inputs.student_logp_T - entropy_weight * inputs.student_entropy_T
    if inputs.teacher_topk_logp_TK.shape[1]:
        loss_T = loss_T + topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm="truncated")
    return TokenLosses(loss_T, inputs.student_mask_T)
