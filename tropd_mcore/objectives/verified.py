"""Objectives whose advantage comes from a verifier and whose teacher shapes the rest of the loss.

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

    Over x ~ p, the gradient of K2 is that of KL(p || q). K2 carries neither ratio nor mismatch weight. Source: KDRL.
    """
    inputs = blank_unsupervised(inputs)
    k2_T = (inputs.teacher_logp_T.detach() - inputs.student_logp_T).square() / 2.0
    value_T = beta * k2_T.detach() - inputs.advantage_T
    terms = TokenTerms(inputs.advantage_T, value_T, divergence_term_T=beta * k2_T, divergence_T=k2_T)
    return sampled_token_loss(inputs, terms, policy=policy)


def rlad(inputs: TokenInputs, *, anchor: float, reference_weight: float, policy: PolicyGradient) -> TokenLosses:
    """The verifier's advantage with the ratio w = p / (p_old^a q^(1 - a)), a = `anchor`, in PPO's surrogate.

    The advantage keeps its sign, the teacher decides where the clip holds. a = 1 is GRPO, a = 0 anchors at the teacher.
    With `reference_weight`, K3 = e^d - 1 - d, d = log ref - log p, is added, differentiable in log p(x). Source: RLAD.
    """
    inputs = blank_unsupervised(inputs)
    old_T = inputs.old_logp_T
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
    """e^d - 1 - d >= 0 of the log-ratio d = log(other / p): over x ~ p, its mean is KL(p || other), nats.

    Differentiated directly, as in GRPO: the mean of its gradient is that of KL(other || p), which agrees with the
    gradient of KL(p || other) to first order in d.
    Beyond LOG_RATIO_LIMIT it is constant; were e^d alone, the gradient of -d would be left and point the wrong way.
    """
    log_ratio_T = log_ratio_T.clamp_max(LOG_RATIO_LIMIT)
    return log_ratio_T.exp() - 1.0 - log_ratio_T
