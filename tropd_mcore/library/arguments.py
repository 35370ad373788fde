"""The arguments of the loss: the student, the teacher, and how the vocabulary is split.

The loss itself is in `loss`, checks between arguments in `checks`. Legend: *T the token shape, [T] or [B, S] or any
other; W vocabulary columns of this rank, D hidden, K teacher candidates, L student candidates. Log-probs are in nats,
over the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.errors import ConfigError, LossInputError
from tropd_mcore.kernel.backend import Backend, Kernel
from tropd_mcore.kernel.choose import backend
from tropd_mcore.kernel.group import Group, OneRank
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.kernel.topk import TopK

PADDED_TO = 128
"""Megatron pads a vocabulary to a multiple of this per rank. With a tiny vocabulary, ranks may have no real column."""


@dataclass(frozen=True)
class VocabParallel:
    """How logits are read: which rank has which columns, and which distribution the logits stand for."""

    group: Group
    """The ranks that split the vocabulary. None is refused, because torch.distributed takes it for all ranks."""
    vocab_size: int
    """Columns with an id of vocab_size or more are padding."""
    start: int | None = None
    """First id of this rank; None = rank x W, as in Megatron."""
    temperature: float = 1.0
    logit_softcap: float | None = None
    """c of c tanh(z / c), before the temperature; None if there is none or the model has applied it."""
    backend: Literal["auto", "eager", "compile", "triton"] | Backend = "auto"
    """`auto`: triton on CUDA, else eager. A `Backend` object is used as it is."""
    chunk_tokens: int = 2048
    """Tokens whose logits exist at the same time; limits the temporary memory."""
    overlap: bool = False
    """Start the next chunk while this one's all-reduce runs (`OutputLayer` only)."""
    debug: bool = False
    """Compare the constants over the group, and check the values of logits, ids, log-probs and uniforms. Each call then
    costs one all-gather and waits for the device."""

    def __post_init__(self) -> None:
        if self.group is None:
            raise LossInputError(
                "VocabParallel: group=None would be the whole world to torch.distributed; pass the group that splits "
                "the vocabulary, or use VocabParallel.single(vocab_size)"
            )
        if self.vocab_size < 1 or self.chunk_tokens < 1 or not self.temperature > 0:
            raise LossInputError(
                f"VocabParallel: expected positive numbers, found vocab_size={self.vocab_size}, "
                f"chunk_tokens={self.chunk_tokens}, temperature={self.temperature}"
            )
        if self.logit_softcap is not None and not self.logit_softcap > 0:
            raise LossInputError(
                f"VocabParallel: logit_softcap={self.logit_softcap}, expected a positive number or None"
            )

    @classmethod
    def single(cls, vocab_size: int, **options: Any) -> VocabParallel:
        """Return one for a single process that has all columns. It does not need torch.distributed."""
        return cls(OneRank(), vocab_size, **options)

    def kernel(self, width: int, device: torch.device, *, overlap: bool) -> Kernel:
        """Return the kernel's arguments for logits [T, width] of this rank. Raises LossInputError."""
        size, rank = self.group.size(), self.group.rank()
        start = rank * width if self.start is None else self.start
        if self.start is None and width * size < self.vocab_size:
            raise LossInputError(
                f"VocabParallel: {size} ranks of {width} columns are {width * size}, fewer than vocab_size="
                f"{self.vocab_size}; is it the group that splits the vocabulary? Pass start= if shards are uneven"
            )
        if self.start is None and size > 1 and width >= self.vocab_size > PADDED_TO * size:
            raise LossInputError(
                f"VocabParallel: each of {size} ranks has {width} columns, all of vocab_size={self.vocab_size}; "
                "pass the columns of this rank"
            )
        try:
            chosen = backend(self.backend, device) if isinstance(self.backend, str) else self.backend
        except ConfigError as error:
            raise LossInputError(f"VocabParallel: {error}".replace("loss.backend", "backend")) from error
        return Kernel(
            shard=VocabShard(start, start + width, self.vocab_size),
            group=self.group,
            backend=chosen,
            scaling=Scaling(self.temperature, self.logit_softcap),
            chunk_tokens=self.chunk_tokens,
            overlap=overlap and self.overlap,
        )


@dataclass(frozen=True)
class OutputLayer:
    """Hidden states and this rank's rows of the output embedding: logits exist for one chunk at a time, in float32."""

    hidden_TD: Tensor
    """[*T, D]"""
    weight_WD: Tensor
    """[W, D] of the same dtype, a plain tensor; no bias"""
    reduce_hidden_grad: bool = True
    """All-reduce dH over the group; False if the backward of your sequence-parallel gather sums it."""
    weight_grad: Literal["deferred", "folded", "recompute"] = "deferred"
    """When dW is computed. `deferred`: in the forward pass, in a float32 buffer that the backward pass scales.
    `folded`: in the forward pass, into main_grad, for a loss that is not scaled afterwards. `recompute`: in the
    backward pass, from logits that are computed again."""


@dataclass(frozen=True)
class TeacherTopK:
    """A teacher's scores of the tokens: constants, equal on all ranks of the group."""

    logp_T: Tensor | None = None
    """[*T], log q of the target token"""
    ids_TK: Tensor | None = None
    """int [*T, K], its most probable tokens, none twice; an id outside the student's vocabulary does not count"""
    logp_TK: Tensor | None = None
    """[*T, K], their true log q, not renormalised; -inf = no candidate"""
    entropy_T: Tensor | None = None
    """[*T], entropy of q, nats"""
    scored_T: Tensor | None = None
    """bool [*T]; False removes the token from sum and count. None = all"""

    @classmethod
    def of(cls, top: TopK, *, scored_T: Tensor | None = None) -> TeacherTopK:
        """Return the scores from the result of `distributed_topk(teacher, ..., ids_TJ=target_ids_T[..., None])`."""
        logp_T = None if top.logp_TJ is None else top.logp_TJ[..., 0]
        return cls(logp_T, top.ids_TK, top.logp_TK, top.entropy_T, scored_T)


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher in this process, split over the ranks like the student; it gets no gradient."""

    source: Tensor | OutputLayer
    """Logits [*T, W'], or hidden states and weight. Each id must be on the same rank as in the student."""
    vp: VocabParallel
    """The teacher's: with the student's group, and usually temperature 1"""
    topk: int = 64
    """Number of candidates to take from it"""
    scored_T: Tensor | None = None
    top: TeacherTopK | None = None
    """Its scores, if they are known already; None = computed by the loss, in one more pass over its logits"""


@dataclass(frozen=True)
class StudentTopK:
    """The student's own candidates before the first update on the batch, from `distributed_topk`."""

    ids_TL: Tensor
    """int [*T, L]"""
    teacher_logp_TL: Tensor
    """[*T, L], true log q of them; -inf if the teacher lacks the id"""
    old_logp_TL: Tensor | None = None
    """[*T, L], log p of them before the first update; None = log p now, detached"""


@dataclass(frozen=True)
class DistillLoss:
    """The loss of the tokens of this rank. The caller divides: sums and counts add up over data ranks, context ranks
    and micro-batches. On the ranks of the vocabulary group they are copies."""

    loss_sum: Tensor
    """scalar, nats, differentiable; float32, or float64 from float64. The same bits on all ranks of the group"""
    token_count: Tensor
    """scalar int64"""
    value: Tensor
    """a detached copy of loss_sum for logging, because some schedules divide loss_sum in place"""
    loss_T: Tensor | None
    """[*T], with reduction="none": weight x loss per token, differentiable, 0 if the token does not count"""
    columns: dict[str, Tensor]
    """[*T] each, detached, NaN if unknown: trusted, log_ratio, divergence, advantage, ratio, clipped, loss,
    teacher_mass, student_mass, student_logp, student_entropy; with measure_force also tv and force"""


def is_group(found: object) -> bool:
    """Whether `found` is a group that can split a vocabulary."""
    return isinstance(found, (OneRank, dist.ProcessGroup))
