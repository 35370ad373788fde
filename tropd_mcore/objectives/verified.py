"""Objectives whose advantage comes from a verifier, with the teacher in a penalty or in the ratio.

`advantage_T` is the advantage of the sample that a token belongs to, relative to the other samples of its prompt
(`objectives.parts.batch_statistics.group_advantage`). p is the student, q the teacher, x the sampled token.

Shapes: T tokens.
"""

from __future__ import annotations

from torch import Tensor

from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.inputs import TokenInputs, blank_unsupervised
from tropd_mcore.objectives.parts.mismatch import LOG_RATIO_LIMIT
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient
from tropd_mcore.objectives.sampled import TokenTerms, sampled_token_loss
from tropd_mcore.sentinels import LOGP_FLOOR


def kdrl(inputs: TokenInputs, *, beta: float, policy: PolicyGradient) -> TokenLosses:
    """The verifier's advantage plus beta times K2 = (log q - log p)^2 / 2, differentiable in log p(x).

    Over x ~ p, the mean gradient of K2 is that of KL(p || q). K2 has neither ratio nor mismatch weight. Source: KDRL.
    """
    inputs = blank_unsupervised(inputs)
    k2_T = (inputs.teacher_logp_T.detach() - inputs.student_logp_T).square() / 2.0
    value_T = beta * k2_T.detach() - inputs.advantage_T
    terms = TokenTerms(inputs.advantage_T, value_T, divergence_term_T=beta * k2_T, divergence_T=k2_T)
    return sampled_token_loss(inputs, terms, policy=policy)


def rlad(inputs: TokenInputs, *, anchor: float, reference_weight: float, policy: PolicyGradient) -> TokenLosses:
    """The verifier's advantage with the ratio w = p / (p_old^a q^(1 - a)), a = `anchor`, in PPO's surrogate.

    The advantage keeps its sign; the teacher decides where the clip applies. a = 1 is GRPO, a = 0 anchors at the
    teacher. `reference_weight` times K3 = e^d - 1 - d, d = log ref - log p, is added, differentiable in log p(x).
    Source: RLAD.
    """
    inputs = blank_unsupervised(inputs)
    old_T = inputs.old_logp_T
    # log of the ratio's denominator, a log p_old + (1 - a) log q, as a step from log p_old.
    anchor_T = old_T + (1.0 - anchor) * (inputs.teacher_logp_T.clamp_min(LOGP_FLOOR) - old_T)
    if reference_weight == 0.0:  # no reference model, and NaN for its log-probs
        terms = TokenTerms(inputs.advantage_T, -inputs.advantage_T, anchor_logp_T=anchor_T)
        return sampled_token_loss(inputs, terms, policy=policy)
    k3_T = k3(inputs.reference_logp_T.detach() - inputs.student_logp_T)
    terms = TokenTerms(
        inputs.advantage_T,
        reference_weight * k3_T.detach() - inputs.advantage_T,
        divergence_term_T=reference_weight * k3_T,
        divergence_T=k3_T,
        anchor_logp_T=anchor_T,
    )
    return sampled_token_loss(inputs, terms, policy=policy)


def k3(log_ratio_T: Tensor) -> Tensor:
    """e^d - 1 - d >= 0 of the log-ratio d = log(other / p). Over x ~ p its mean is KL(p || other), nats.

    It is differentiated directly, as in GRPO. The mean of its gradient is that of KL(other || p), which agrees with the
    gradient of KL(p || other) to first order in d. Above LOG_RATIO_LIMIT it is constant. If only e^d were clamped, the
    gradient of -d would remain and point the wrong way.
    """
    log_ratio_T = log_ratio_T.clamp_max(LOG_RATIO_LIMIT)
    return log_ratio_T.exp() - 1.0 - log_ratio_T
