"""Self-distillation: the teacher is the student itself (an average of its weights) given a solution in its prompt.

The functions take the per-token numbers of one micro-batch; this module does not build the teacher. p is the student, q
the teacher, x the sampled token. Invariant: no mean, no host sync; a token outside both masks has no influence.

Shapes: T tokens, L the student's own top-k.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs, blank_unsupervised
from tropd_mcore.objectives.parts.divergences import (
    entry_clipped_forward_kl,
    topk_forward_kl,
    topk_jensen_shannon,
    topk_reverse_kl,
)
from tropd_mcore.objectives.parts.mismatch import LOG_RATIO_LIMIT
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient, engine_weight
from tropd_mcore.objectives.sampled import TokenTerms, sampled_token_loss


def sdpo(inputs: TokenInputs, *, alpha: float, norm: str, ratio_cap: float, policy: PolicyGradient) -> TokenLosses:
    """Jensen-Shannon divergence on the student's own candidates, times constants that correct for outdated samples.

        min(p / p_old, ratio_cap) c ((1 - alpha) KL(p || mix) + alpha KL(q || mix)),  mix = (1 - alpha) p + alpha q,

    c is the mismatch weight. alpha = 0 is computed as KL(q || p) and alpha = 1 as KL(p || q); there the formula
    itself is 0. norm: `tail` or `renorm`. The gradient flows through the candidates' log-probs; the ratio at x is a
    constant. Source: SDPO, arXiv 2601.20802 (0.5, top-100, tail, cap 2).
    """
    inputs = blank_unsupervised(inputs)
    divergence_T = _on_own_candidates(inputs, alpha, norm)
    moved_T = (inputs.student_logp_T - inputs.old_logp_T).detach()
    ratio_T = moved_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp_max(ratio_cap)
    engine_T = engine_weight(inputs.old_logp_T, inputs.rollout_logp_T, policy)
    terms = TokenTerms(
        torch.zeros_like(ratio_T),
        value_T=divergence_T,
        divergence_term_T=ratio_T * engine_T * divergence_T,
        divergence_T=divergence_T,
    )
    output = sampled_token_loss(inputs, terms, policy=PolicyGradient())
    used_T = torch.where(inputs.student_mask_T, ratio_T, 1.0)
    return replace(output, columns={**output.columns, "ratio": used_T})


def opsd(inputs: TokenInputs, *, entry_clip: float, norm: str) -> TokenLosses:
    """Forward KL on the student's own candidates whose entries are bounded: sum_v min(q log(q / p), entry_clip).

    norm: `truncated`, or `tail`, whose tail entry is bounded like the others. A clipped entry has no gradient. The
    column clipped_entries counts clipped entries on the student's tokens; NaN elsewhere.
    Source: OPSD, arXiv 2601.18734v3; there the sum is over the whole vocabulary.
    """
    inputs = blank_unsupervised(inputs)
    divergence_T, clipped_T = entry_clipped_forward_kl(
        inputs.student_own_logp_TL, inputs.teacher_own_logp_TL, bound=entry_clip, norm=norm
    )
    terms = TokenTerms(
        torch.zeros_like(divergence_T),
        value_T=divergence_T,
        divergence_term_T=divergence_T,
        divergence_T=divergence_T,
    )
    output = sampled_token_loss(inputs, terms, policy=PolicyGradient())
    entries_T = torch.where(inputs.student_mask_T, clipped_T, torch.nan)
    return replace(output, columns={**output.columns, "clipped_entries": entries_T})


def _on_own_candidates(inputs: TokenInputs, alpha: float, norm: str) -> Tensor:
    """The divergence of each token on the student's own top-k, [T]."""
    student_TL, teacher_TL = inputs.student_own_logp_TL, inputs.teacher_own_logp_TL
    if alpha == 0.0:
        return topk_forward_kl(student_TL, teacher_TL, norm=norm)
    if alpha == 1.0:
        return topk_reverse_kl(student_TL, teacher_TL, norm=norm)
    return topk_jensen_shannon(student_TL, teacher_TL, beta=alpha, norm=norm)
