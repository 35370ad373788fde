"""Inputs designed to expose a wrong loss: random, small, of odd sizes, and hostile where real data may be.

Every case has: unequal numbers of tokens per sample; sampled tokens inside and outside the teacher's top-k, with both
signs of the log-ratio; student and teacher candidates that overlap; candidates on the borders of every layout's shards;
large logits in the padding columns; a policy that has moved since the rollout, and a sampler that differs from it;
tokens of student, teacher and neither; rewards that vary. By default it also has weights other than 1, absent
candidates, and NaN in the numbers of tokens in neither mask (`Conditions`).

Invariant: a pure function of its arguments. Numbers are first rounded to the dtype that the loss is given, so that the
oracle and the loss see the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from tropd_mcore.conformance.batch import CaseBatch, Student, Tokens
from tropd_mcore.conformance.entries import STUDENT_TOPK, TOPK

SEED = 20_260_602
"""With this seed the objectives' decisions come out both ways and none is close (see `oracle.decisions`)"""
LOGIT_SPREAD = 2.9
"""Standard deviation of the student's logits"""
SAMPLE_LENGTHS = (8, 1, 6, 5, 7)
SAMPLE_GROUPS = (0, 0, 0, 1, 1)
REWARDS = (1.0, 0.0, 0.5, 1.0, 0.0)
OUTSIDE_ROWS = (3, 11, 26)
"""in neither mask"""
TEACHER_ROWS = (0, 1, 9, 15)
"""sampled by the teacher: the first tokens of three samples"""
ABSENT_ROWS = (2, 9, 17)
"""without the last two teacher candidates and the last student candidate"""
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
NEGATIVE_INFINITY = float("-inf")
GRID = 1 / 16


@dataclass(frozen=True)
class Shape:
    """Sizes of the output layers."""

    vocabulary: int
    columns: int
    """with the padding of the widest layout"""
    hidden: int
    border_ids: tuple[int, ...]
    """first and last real columns of the shards of all layouts (see `layouts`)"""


SHAPES = {
    "small": Shape(29, 48, 7, (0, 10, 11, 13, 14, 15, 16, 18, 19, 28)),
    "megatron": Shape(203, 256, 16, (0, 127, 128, 202)),
}
"""`megatron`: shards are multiples of 128 columns, as Megatron cuts them"""


@dataclass(frozen=True)
class Conditions:
    """The options of a case."""

    dtype: str = "float64"
    shape: str = "small"
    temperature: float = 1.0
    softcap: float | None = None
    weighted: bool = True
    """Weights other than 1"""
    hostile: bool = True
    """NaN in rows that no loss may read, and absent candidates"""


@lru_cache(maxsize=16)
def make_batch(conditions: Conditions) -> CaseBatch:
    """Return the case."""
    draw = torch.Generator().manual_seed(SEED)
    dtype = DTYPES[conditions.dtype]
    math_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    shape, tokens_count = SHAPES[conditions.shape], sum(SAMPLE_LENGTHS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    hidden_TD = normal(tokens_count, shape.hidden)
    weight_WD = LOGIT_SPREAD / shape.hidden**0.5 * normal(shape.columns, shape.hidden)
    weight_WD[shape.vocabulary :] *= 4.0
    student = _output_layer(hidden_TD, weight_WD, dtype)
    teacher = _output_layer(
        torch.cat([hidden_TD, normal(tokens_count, shape.hidden)], dim=1),
        torch.cat([0.8 * weight_WD, 1.4 / shape.hidden**0.5 * normal(shape.columns, shape.hidden)], dim=1),
        dtype,
    )

    def log_probs(logits_TV: Tensor, temperature: float) -> Tensor:
        return scaled(logits_TV, temperature, conditions.softcap).log_softmax(dim=1)

    logits_TV = exact_logits(student)[:, : shape.vocabulary]
    shift_TV = 0.12 * normal(tokens_count, shape.vocabulary)
    shift_TV[::5] *= 8.0  # some tokens have moved far beyond every clip
    old_TV = log_probs(logits_TV + shift_TV, conditions.temperature)
    behav_TV = log_probs(logits_TV + shift_TV + 0.4 * normal(tokens_count, shape.vocabulary), conditions.temperature)
    teacher_TV = log_probs(exact_logits(teacher)[:, : shape.vocabulary], 1.0)
    reference_TV = log_probs(logits_TV + 0.5 * normal(tokens_count, shape.vocabulary), conditions.temperature)
    topk_ids_TK = _with_borders(teacher_TV, shape, draw)
    own_ids_TL = old_TV.topk(STUDENT_TOPK, dim=1).indices
    target_ids_T = _sampled(old_TV, teacher_TV, topk_ids_TK, shape)

    def rounded(number: Tensor) -> Tensor:
        return number.to(math_dtype).to(torch.float64)

    def of(log_probs_TV: Tensor, ids_TX: Tensor) -> Tensor:
        return rounded(log_probs_TV.gather(1, ids_TX))

    x_T1 = target_ids_T[:, None]
    student_mask_T, prefix_mask_T = _masks(tokens_count)
    weight_T = 0.25 + 1.5 * torch.rand(tokens_count, generator=draw, dtype=torch.float64)
    tokens = Tokens(
        target_ids_T=target_ids_T,
        topk_ids_TK=topk_ids_TK,
        own_ids_TL=own_ids_TL,
        teacher_logp_T=of(teacher_TV, x_T1)[:, 0],
        teacher_topk_logp_TK=of(teacher_TV, topk_ids_TK),
        teacher_own_logp_TL=of(teacher_TV, own_ids_TL),
        teacher_entropy_T=rounded(-(teacher_TV.exp() * teacher_TV).sum(dim=1)),
        reference_logp_T=of(reference_TV, x_T1)[:, 0],
        old_logp_T=of(old_TV, x_T1)[:, 0],
        old_own_logp_TL=of(old_TV, own_ids_TL),
        old_entropy_T=rounded(-(old_TV.exp() * old_TV).sum(dim=1)),
        rollout_logp_T=of(behav_TV, x_T1)[:, 0],
        trust_u_T=rounded(torch.rand(tokens_count, generator=draw, dtype=torch.float64)),
        student_mask_T=student_mask_T,
        prefix_mask_T=prefix_mask_T,
        weight_T=rounded(weight_T if conditions.weighted else torch.ones_like(weight_T)),
        sample_T=torch.arange(len(SAMPLE_LENGTHS)).repeat_interleave(torch.tensor(SAMPLE_LENGTHS)),
    )
    return CaseBatch(
        student=student,
        teacher=teacher,
        vocab_size=shape.vocabulary,
        temperature=conditions.temperature,
        softcap=conditions.softcap,
        tokens=_hostile(tokens) if conditions.hostile else tokens,
        group_S=torch.tensor(SAMPLE_GROUPS),
        reward_S=torch.tensor(REWARDS, dtype=torch.float64),
    )


def exact_logits(layer: Student) -> Tensor:
    """Return the product of an output layer in float64, [T, W]."""
    return layer.hidden_TD.double() @ layer.weight_WD.double().T


def scaled(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Return the argument of the softmax: softcap * tanh(z / softcap) / temperature."""
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


def _output_layer(hidden_TD: Tensor, weight_WD: Tensor, dtype: torch.dtype) -> Student:
    """For bfloat16 the numbers are on a grid, so that the product is exact in float32 in any order of its terms. Then
    everyone who computes logits and rounds them to bfloat16 gets the same logits."""
    if dtype == torch.bfloat16:
        hidden_TD, weight_WD = ((number / GRID).round() * GRID for number in (hidden_TD, weight_WD))
    layer = Student(hidden_TD.to(dtype), weight_WD.to(dtype), torch.empty(0))
    return replace(layer, logits_TW=exact_logits(layer).to(dtype))


def _with_borders(teacher_TV: Tensor, shape: Shape, draw: torch.Generator) -> Tensor:
    """The teacher's top-k; in every third row its last two entries are borders of shards instead."""
    ids_TK = teacher_TV.topk(TOPK, dim=1).indices
    for row in range(0, len(ids_TK), 3):
        kept = ids_TK[row, :-2].tolist()
        borders = [shape.border_ids[at] for at in torch.randperm(len(shape.border_ids), generator=draw).tolist()]
        ids_TK[row, -2:] = torch.tensor([vocabulary_id for vocabulary_id in borders if vocabulary_id not in kept][:2])
    return ids_TK


def _sampled(old_TV: Tensor, teacher_TV: Tensor, topk_ids_TK: Tensor, shape: Shape) -> Tensor:
    """x of each row, in turn: the student's first, the teacher's first, the teacher's third candidate, the token that
    the teacher rates lowest among the student's likely ones, and a border of a shard."""
    likely_TV = old_TV.topk(8, dim=1).indices
    sampled_T = likely_TV[:, 0].clone()
    for row in range(len(sampled_T)):
        if row % 5 == 1:
            sampled_T[row] = topk_ids_TK[row, 0]
        elif row % 5 == 2:
            sampled_T[row] = topk_ids_TK[row, 2]
        elif row % 5 == 3:
            sampled_T[row] = likely_TV[row, teacher_TV[row, likely_TV[row]].argmin()]
        elif row % 5 == 4:
            sampled_T[row] = shape.border_ids[row % len(shape.border_ids)]
    return sampled_T


def _masks(tokens: int) -> tuple[Tensor, Tensor]:
    prefix_mask_T = torch.zeros(tokens, dtype=torch.bool)
    prefix_mask_T[list(TEACHER_ROWS)] = True
    student_mask_T = ~prefix_mask_T
    student_mask_T[list(OUTSIDE_ROWS)] = False
    return student_mask_T, prefix_mask_T


def _hostile(tokens: Tokens) -> Tokens:
    """The same tokens with absent candidates, and with NaN in every number but the weight outside both masks."""
    outside, absent = torch.tensor(OUTSIDE_ROWS), torch.tensor(ABSENT_ROWS)
    numbers = {}
    for name, number in vars(tokens).items():
        if number.dtype == torch.float64 and name != "weight_T":
            numbers[name] = number.index_fill(0, outside, torch.nan)
    topk_ids_TK = tokens.topk_ids_TK.clone()
    topk_ids_TK[absent, -2:] = -1
    numbers["teacher_topk_logp_TK"][absent, -2:] = NEGATIVE_INFINITY
    numbers["teacher_own_logp_TL"][absent, -1:] = NEGATIVE_INFINITY
    return replace(tokens, topk_ids_TK=topk_ids_TK, **numbers)
