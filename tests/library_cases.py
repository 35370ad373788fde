"""Tokens of a student and a teacher with their whole vocabularies, for the tests of the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tropd_mcore import (
    StudentTopK,
    TeacherLogits,
    TeacherTopK,
    VocabParallel,
    distill_loss,
)
from tropd_mcore.config.objectives import KINDS
from tropd_mcore.objectives.catalogue import Objective

V, D, K, L, B, S = 37, 8, 5, 3, 3, 7
VP = VocabParallel.single(V, chunk_tokens=4)
NAMES = sorted(set(KINDS) - {"custom"})
EVERY = {
    "trust_u_T", "rollout_logp_T", "old_logp_T", "reference_logp_T", "advantage_T", "selected_T", "history_weight_T",
}  # fmt: skip


class Case:
    """Tokens [B, S] of a student and a teacher with whole vocabularies, in float64."""

    def __init__(self, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        self.hidden, self.weight = normal(B, S, D), normal(V, D)
        self.teacher = normal(B, S, V)
        self.x = torch.randint(V, (B, S), generator=random)
        log_q, old = self.teacher.log_softmax(-1), (self.logits() + 0.3 * normal(B, S, V)).log_softmax(-1)
        self.log_q_x, top = self.at(log_q), log_q.topk(K, dim=-1)
        entropy = -(log_q.exp() * log_q).sum(-1)
        self.top = TeacherTopK(self.log_q_x, top.indices, top.values, entropy)
        own = old.topk(L, dim=-1)
        self.own = StudentTopK(own.indices, log_q.gather(-1, own.indices), own.values)
        self.mask = torch.rand(B, S, generator=random) < 0.7
        self.given: dict[str, Tensor] = {
            "trust_u_T": torch.rand(B, S, generator=random, dtype=torch.float64),
            "rollout_logp_T": self.at(old) + 0.1 * normal(B, S),
            "old_logp_T": self.at(old),
            "reference_logp_T": self.at(normal(B, S, V).log_softmax(-1)),
            "advantage_T": normal(B, S),
            "selected_T": (torch.rand(B, S, generator=random) < 0.5).double(),
            "history_weight_T": 1.0 + normal(B, S).abs(),
        }
        self.weights = 1.0 + normal(B, S).abs()

    def logits(self) -> Tensor:
        return self.hidden @ self.weight.T

    def advantage(self) -> Tensor:
        return self.given["advantage_T"]

    def at(self, numbers: Tensor) -> Tensor:
        return numbers.gather(-1, self.x[..., None])[..., 0]

    def all_of(self, objective: Objective) -> dict[str, Any]:
        """Every argument that `objective` reads."""
        found: dict[str, Any] = {name: self.given[name] for name in EVERY & objective.needs}
        if {"student_topk", "student_topk.old_logp_TL"} & objective.needs:
            found["student_topk"] = self.own
        return {**found, "student_mask_T": self.mask, "weight_T": self.weights}

    def teacher_of(self, objective: Objective) -> TeacherTopK | TeacherLogits:
        return TeacherLogits(self.teacher, VP, topk=K, top=self.top) if objective.whole else self.top


def run(case: Case, objective: Objective, **changes: Any) -> tuple[Any, Tensor]:
    """The loss, and its gradient in the logits [B, S, V]."""
    leaf = case.logits().requires_grad_()
    arguments = {**case.all_of(objective), **changes}
    out = distill_loss(leaf * 1.0, case.x, case.teacher_of(objective), objective, vp=VP, **arguments)
    (out.loss_sum if out.loss_T is None else out.loss_T.sum()).backward()
    assert leaf.grad is not None
    return out, leaf.grad
