"""The loss of a case and its gradients: a sum over tokens, and autograd back to logits, hidden states and weight."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from tropd_mcore.config.objectives import ObjectiveConfig
from tropd_mcore.conformance.batch import CaseBatch, Student
from tropd_mcore.conformance.oracle.decisions import Decisions
from tropd_mcore.conformance.oracle.token import Token, make_token

Form = Literal["fused", "logits"]
"""The reference logits: `fused` the exact product of the output layer, `logits` the rounded logits that are given."""


@dataclass(frozen=True)
class Truth:
    """The correct loss and gradients. float64, whole vocabulary, no padding."""

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


def evaluate(objective: ObjectiveConfig, batch: CaseBatch, progress: float, form: Form) -> Truth:
    """Return the truth of a case. `progress` is step / run.steps."""
    # L = sum over the supervised tokens of weight x loss. dL/dlogits by autograd, over the whole vocabulary at once;
    # then dL/dhidden = dL/dlogits @ weight and dL/dweight = dL/dlogits.T @ hidden.
    decide = Decisions()
    student_TV = _logits(batch.student, form)[:, : batch.vocab_size].clone().requires_grad_()
    teacher_TV = _logits(batch.teacher, form)[:, : batch.vocab_size]
    family = importlib.import_module(f"{__package__}.{objective.family}")
    of_batch = _statistic(family, objective, batch, progress, decide)
    losses, count = [], 0
    for row in range(len(student_TV)):
        learns = _learns_from_prefixes(family, objective)
        if not (batch.tokens.student_mask_T[row] or (learns and batch.tokens.prefix_mask_T[row])):
            continue
        token = make_token(
            batch.tokens,
            row,
            _log_softmax(student_TV[row], batch.temperature, batch.softcap),
            _log_softmax(teacher_TV[row], 1.0, batch.softcap),
            of_batch[row],
            progress,
        )
        losses.append(float(batch.tokens.weight_T[row]) * _loss(family, objective, token, decide))
        count += _counts(family, objective, token)
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


def _loss(family: ModuleType, objective: ObjectiveConfig, token: Token, decide: Decisions) -> Tensor:
    """The loss of one token, by the function `<kind>` of the family."""
    loss: Tensor = getattr(family, objective.kind)(objective, token, decide)
    return loss


def _learns_from_prefixes(family: ModuleType, objective: ObjectiveConfig) -> bool:
    """Whether the teacher's tokens are trained and counted: if the kind says so and no section switches it off."""
    if objective.kind not in getattr(family, "LEARNS_FROM_PREFIXES", ()):
        return False
    return objective.has_prefix_loss or not hasattr(objective, "guidance")


def _statistic(
    family: ModuleType, objective: ObjectiveConfig, batch: CaseBatch, progress: float, decide: Decisions
) -> list[float]:
    """The batch statistic of each token, by `<kind>_statistic` of the family; 1 if there is no such function."""
    statistic = getattr(family, f"{objective.kind}_statistic", None)
    if statistic is None:
        return [1.0] * len(batch.tokens.target_ids_T)
    found: list[float] = statistic(objective, batch, progress, decide)
    return found


def _counts(family: ModuleType, objective: ObjectiveConfig, token: Token) -> bool:
    """Whether the token is in the denominator, by `<kind>_counts` of the family; True if there is no such function."""
    counts = getattr(family, f"{objective.kind}_counts", None)
    return True if counts is None else bool(counts(objective, token))
