"""The loss of a case and its gradients: the sum over its tokens, and autograd back to the logits and beyond."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tropd_mcore.config.advantage_objectives import EntropyOpdObjective, KdrlObjective, ReopoldObjective
from tropd_mcore.config.divergence_objectives import CustomObjective, GkdObjective
from tropd_mcore.config.schema import ObjectiveConfig
from tropd_mcore.config.tropd_objectives import TropdObjective
from tropd_mcore.conformance.batch import Batch, Student
from tropd_mcore.conformance.oracle import matching, rewards, trust_region
from tropd_mcore.conformance.oracle.decisions import Decisions
from tropd_mcore.conformance.oracle.statistics import statistics
from tropd_mcore.conformance.oracle.token import Token, make_token

Form = Literal["fused", "logits"]
"""Whether a loss is held to the exact product of the output layer, or to the rounded logits that it is given."""


@dataclass(frozen=True)
class Truth:
    """What is right. float64, whole vocabulary, no padding."""

    loss: float
    """sum over the tokens of weight x loss"""
    loss_scale: float
    """sum over the tokens of |weight x loss|"""
    token_count: int
    """tokens in the denominator of the mean"""
    logits_TV: Tensor
    """dL/dlogits"""
    hidden_TD: Tensor
    """dL/dhidden"""
    weight_VD: Tensor
    """dL/dweight"""
    decisions: Decisions


_RULES: dict[str, Callable[[Any, Token, Decisions], Tensor]] = {
    "opd": trust_region.opd,
    "tropd": trust_region.tropd,
    "aopd": trust_region.aopd,
    "tropd_aopd": trust_region.tropd_aopd,
    "reopold": rewards.reopold,
    "entropy_opd": rewards.entropy_opd,
    "exopd": rewards.exopd,
    "topd": rewards.topd,
    "vopd": rewards.vopd,
    "iw_opd": rewards.iw_opd,
    "power_opd": rewards.power_opd,
    "rlad": rewards.rlad,
    "rethinking": rewards.rethinking,
    "eopd": matching.eopd,
    "jsd": matching.jsd,
    "lsm": matching.lsm,
    "sdpo": matching.sdpo,
}


def evaluate(objective: ObjectiveConfig, batch: Batch, progress: float, form: Form) -> Truth:
    """Return the truth of a case. `progress` is step / run.steps."""
    decide = Decisions()
    student_TV = _logits(batch.student, form)[:, : batch.vocab_size].clone().requires_grad_()
    teacher_TV = _logits(batch.teacher, form)[:, : batch.vocab_size]
    of_batch = statistics(objective, batch, progress, decide)
    losses, count = [], 0
    for row in range(len(student_TV)):
        if not (batch.tokens.on_mask_T[row] or batch.tokens.off_mask_T[row]):
            continue
        token = make_token(
            batch.tokens,
            row,
            _log_softmax(student_TV[row], batch.temperature, batch.softcap),
            _log_softmax(teacher_TV[row], 1.0, batch.softcap),
            of_batch[row],
        )
        losses.append(float(batch.tokens.weight_T[row]) * _loss(objective, token, progress, decide))
        count += _counts(objective, token)
    total = torch.stack(losses)
    (gradient_TV,) = torch.autograd.grad(total.sum(), student_TV)
    return Truth(
        loss=float(total.detach().sum()),
        loss_scale=float(total.detach().abs().sum()),
        token_count=count,
        logits_TV=gradient_TV,
        hidden_TD=gradient_TV @ batch.student.weight_WD[: batch.vocab_size].double(),
        weight_VD=gradient_TV.T @ batch.student.hidden_TD.double(),
        decisions=decide,
    )


def _logits(layer: Student, form: Form) -> Tensor:
    if form == "logits":
        return layer.logits_TW.double()
    return layer.hidden_TD.double() @ layer.weight_WD.double().T


def _log_softmax(logits_V: Tensor, temperature: float, softcap: float | None) -> Tensor:
    capped_V = logits_V if softcap is None else softcap * torch.tanh(logits_V / softcap)
    return torch.log_softmax(capped_V / temperature, dim=0)


def _loss(objective: ObjectiveConfig, token: Token, progress: float, decide: Decisions) -> Tensor:
    """The loss of one token. Only the objectives with guidance learn from tokens that the teacher sampled."""
    if isinstance(objective, CustomObjective):
        return _elementary(objective.function, token)
    if not token.sampled_by_student and not isinstance(objective, TropdObjective):
        return 0.0 * token.log_p
    if isinstance(objective, KdrlObjective):
        return rewards.kdrl(objective, token, decide, progress)
    if isinstance(objective, GkdObjective):
        return matching.gkd(objective, token)
    return _RULES[objective.kind](objective, token, decide)


def _elementary(function: str, token: Token) -> Tensor:
    """The two building blocks of the catalogue: -log p(x), and minus the entropy."""
    if function.endswith(":negative_log_prob"):
        return -token.log_p
    assert function.endswith(":negative_entropy"), function
    return (token.log_p_V.exp() * token.log_p_V).sum()


def _counts(objective: ObjectiveConfig, token: Token) -> bool:
    """Whether the token is in the denominator."""
    if isinstance(objective, EntropyOpdObjective) and objective.denominator == "selected":
        return token.sampled_by_student and token.statistic > 0
    if isinstance(objective, ReopoldObjective) and objective.stages == 2:
        return token.sampled_by_student and token.statistic > 0
    return True
