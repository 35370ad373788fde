"""The data of a case: the inputs of a loss as seen by one process that holds the whole vocabulary.

`cases` makes them and `layouts` splits them over ranks. p is the student, q the teacher, x the sampled token.

Shapes: T tokens, V vocabulary, W >= V columns of the output layers with padding, D hidden, K teacher top-k, L student
top-k, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Student:
    """The last layer of the student (or teacher). The logits are its product, rounded to its dtype. A form of the loss
    that takes logits is compared with the oracle on these rounded logits."""

    hidden_TD: Tensor
    weight_WD: Tensor
    logits_TW: Tensor


@dataclass(frozen=True)
class Tokens:
    """Per-token numbers, the same on every rank: float64, but representable in the dtype that the loss computes in.

    With `Conditions.hostile`, rows outside both masks hold NaN in every number except `weight_T`.
    """

    target_ids_T: Tensor
    """x"""
    topk_ids_TK: Tensor
    """the teacher's top-k; -1 if absent"""
    own_ids_TL: Tensor
    """the student's top-k before the update"""
    teacher_logp_T: Tensor
    """log q(x)"""
    teacher_topk_logp_TK: Tensor
    """log q of the top-k, over the whole vocabulary; -inf if absent"""
    teacher_own_logp_TL: Tensor
    """log q of the student's top-k; -inf if absent"""
    teacher_entropy_T: Tensor
    """entropy of q"""
    reference_logp_T: Tensor
    """log-prob of x under the reference"""
    old_logp_T: Tensor
    """log p(x) before the update"""
    old_own_logp_TL: Tensor
    """log p of the student's top-k before the update"""
    old_entropy_T: Tensor
    """entropy of p before the update"""
    rollout_logp_T: Tensor
    """log p(x) as the sampler reported it"""
    trust_u_T: Tensor
    """uniform in [0, 1)"""
    student_mask_T: Tensor
    """sampled by the student"""
    prefix_mask_T: Tensor
    """sampled by the teacher"""
    weight_T: Tensor
    """factor of the token's loss"""
    sample_T: Tensor
    """index of the sample that the token belongs to; tokens of a sample are in order"""

    def rows(self, index: Tensor) -> Tokens:
        """Return the tokens of these rows."""
        return Tokens(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


@dataclass(frozen=True)
class CaseBatch:
    """Everything that a loss may read."""

    student: Student
    teacher: Student
    """the teacher's last layer, for divergences over the whole vocabulary"""
    vocab_size: int
    temperature: float
    """of p; q is at 1"""
    softcap: float | None
    """of student and teacher"""
    tokens: Tokens
    group_S: Tensor
    """index of the prompt that the sample answers"""
    reward_S: Tensor
    """the verifier's reward of the sample"""

    @property
    def dtype(self) -> torch.dtype:
        """Of the output layers."""
        return self.student.weight_WD.dtype
