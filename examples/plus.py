"""An objective of our own, in one file: a clipped reward on every token, and forward KL on outliers on top.

    PYTHONPATH=examples tropd train configs/quickstart-cpu.yaml run.dir=runs/plus \\
        "objective={kind: custom, function: 'plus:plus', topk: 16}"

No paper has this objective. TrOPD gives an outlier the forward KL *instead of* its reward. Here it gets both: the
floored reward keeps pushing rare mistakes down, and the forward KL leaves confident mistakes (docs/choosing.md).

    loss of a token = - w max(r, floor) log p(x) + weight (1 - t) FKL        tokens that the student sampled

r = log q(x) - log p_old(x), t = 1 with probability min(1, q(x) / p_old(x)) (the trust gate of TrOPD), and FKL is the
forward KL(q || p) on the teacher's top-k. Gradients flow through log p(x) and FKL. The file shows what a custom
objective may import, how it refuses wrong arguments, and how it is used in another trainer (`objective`). It sees
log-probs over the whole vocabulary, so it works on any number of tensor ranks.

Shapes: T tokens.
"""

from __future__ import annotations

import math
from typing import Any

from tropd_mcore import TokenInputs, TokenLosses, objectives
from tropd_mcore.errors import ConfigError
from tropd_mcore.objectives.catalogue import CHOICES, LAMBDA_RATIO, NO_DUAL_CLIP, Objective, PolicyGradient
from tropd_mcore.objectives.inputs import blank_unsupervised, log_ratio
from tropd_mcore.objectives.parts.divergences import topk_forward_kl
from tropd_mcore.objectives.parts.policy_gradient import clipped_reward
from tropd_mcore.objectives.parts.trust import trust_gate
from tropd_mcore.objectives.sampled import TokenTerms, sampled_token_loss

NEEDS = ("target_ids_T", "teacher.logp_T", "teacher.ids_TK", "teacher.logp_TK", "trust_u_T")
"""Arguments of `distill_loss` that the function reads."""


def plus(
    inputs: TokenInputs,
    *,
    floor: float = LAMBDA_RATIO,
    weight: float = 1.0,
    trust_mode: str = "bernoulli",
    norm: str = "truncated",
    policy: PolicyGradient = NO_DUAL_CLIP,
) -> TokenLosses:
    """Return the loss of each token: floored reward on all of the student's tokens, plus forward KL on its outliers.

    `floor` (nats, below 0) bounds the reward from below, and its default is that of `reopold`. `weight` multiplies the
    forward KL of an outlier. With weight 0 this is `reopold`; without a floor (-inf) and with the gate `soft`, the
    expected gradient is that of `opd` plus TV(p, q) times that of the forward KL. Tokens of a teacher prefix are not
    trained. Raises ConfigError for a constant outside its range.
    """
    _check(floor, weight, trust_mode, norm)
    inputs = blank_unsupervised(inputs)
    r_T = log_ratio(inputs)
    trust_T = trust_gate(r_T, mode=trust_mode, trust_u_T=inputs.trust_u_T, threshold=floor)
    fkl_T = topk_forward_kl(inputs.student_topk_logp_TK, inputs.teacher_topk_logp_TK, norm=norm)
    added_T = weight * (1.0 - trust_T) * fkl_T
    advantage_T = clipped_reward(r_T, policy.advantage_clip).clamp_min(floor)
    terms = TokenTerms(
        advantage_T,
        value_T=added_T - advantage_T,
        trusted_T=trust_T,
        divergence_term_T=added_T,
        divergence_T=fkl_T,
    )
    return sampled_token_loss(inputs, terms, policy=policy)


def objective(**constants: Any) -> Objective:
    """Return `plus` for `distill_loss` in another trainer. Without its inputs, a call is refused in one line."""
    return objectives.custom(plus, needs=NEEDS, **constants)


def _check(floor: float, weight: float, trust_mode: str, norm: str) -> None:
    """Raise ConfigError with every argument that is no constant of `plus`."""
    problems = []
    if not isinstance(floor, int | float) or not floor < 0:
        problems.append(f"objective.arguments.floor: expected a number below 0 (nats), found {floor!r}")
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        problems.append(f"objective.arguments.weight: expected a number of at least 0, found {weight!r}")
    for name, word in (("trust_mode", trust_mode), ("norm", norm)):
        if word not in CHOICES[name]:
            problems.append(f"objective.arguments.{name}: expected one of {', '.join(CHOICES[name])}, found {word!r}")
    if problems:
        raise ConfigError(problems)
