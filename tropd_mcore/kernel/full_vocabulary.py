"""The exact divergence from a teacher over the whole vocabulary: a dense term in addition to the support of the loss.

It needs a teacher whose logits, or hidden states and output layer, are sharded like the student's. This module does not
handle divergences on a few candidates (`objectives.parts.divergences`). Student p and teacher q are softmaxes over the
ids that both vocabularies have. Ids that only one has (padding rows of a wider embedding) are excluded. p is at the
rollout temperature, q at 1.

Invariant: the value is bit-identical on all ranks. FKL and RKL use the chunk's own all-reduce. The JSD needs one more
of [C, 2 N] numbers, because its mixture needs both normalisations first.

Shapes: T tokens, C tokens of a chunk, W width of this rank's vocabulary shard, R its real columns, U <= R those that
both vocabularies have, N ranks, M = 5 statistics of a shard.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tropd_mcore.errors import ModelError
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.group import all_reduce
from tropd_mcore.kernel.shard import Scaling, VocabShard, math_dtype, scaled_logits
from tropd_mcore.kernel.source import GivenLogits, LogitSource
from tropd_mcore.sentinels import LEAST_LOGIT

IMPOSSIBLE = -LEAST_LOGIT / 1e10
"""A divergence above this many nats compares a possible token with one whose logit is -inf, and becomes infinite."""


class FullVocabulary:
    """KL(q || p) (`fkl`), KL(p || q) (`rkl`) or beta KL(q || mix) + (1 - beta) KL(p || mix) (`jsd`) of each row.

    mix = beta q + (1 - beta) p. A `FullVocabTerm` of `support_loss`, which calls for each chunk `partials`, then
    `value`, then `gradient` if the loss depends on the value. With kernel.overlap the partials of the next chunk may
    come in between. Memory: the teacher's logits of one chunk (two with overlap) in the math dtype, and a few
    temporaries of that size.

    teacher: the same T rows as the student's. teacher_shard: its columns on this rank. It may be padded further, but
    each id must be on the same rank as the student's. teacher_scaling: None = temperature 1 and the student's softcap.
    Raises ModelError if an id is on another rank.
    """

    # Let z and t be the scaled logits of student and teacher. a is the one whose softmax a~ the divergence is an
    # expectation over, b the other: KL(a~ || b~). A and B are their maxima on one shard, Z_a and Z_b the logsumexp over
    # all shards. Each shard has, over its columns v,
    #     cross = sum_v e^(a_v - A) ((a_v - A) - (b_v - B))                                              (`partials`)
    #     sum_v e^(a_v - A) (log a~_v - log b~_v) = cross + ((A - Z_a) - (B - Z_b)) sum_v e^(a_v - A)    (`value`)
    # The sum of the second line over shards, weighted by e^(A - max A), over that of sum_v e^(a_v - A) is the
    # divergence. All terms are relative to maxima, so that large logits do not cancel.

    def __init__(
        self,
        teacher: LogitSource,
        kernel: Kernel,
        *,
        teacher_shard: VocabShard,
        teacher_scaling: Scaling | None = None,
        divergence: str,
        beta: float = 0.5,
    ) -> None:
        assert divergence in ("fkl", "rkl", "jsd"), f"unknown divergence {divergence!r}"
        self._teacher, self._kernel, self._divergence, self._beta = teacher, kernel, divergence, beta
        self._teacher_width = teacher_shard.width
        self._teacher_scaling = teacher_scaling or Scaling(temperature=1.0, softcap=kernel.scaling.softcap)
        self._common = _common_columns(kernel.shard, teacher_shard)
        self._buffers: list[Tensor | None] = [None, None] if kernel.overlap else [None]
        self._chunks: list[_Chunk | None] = [None] * len(self._buffers)

    @torch.no_grad()
    def partials(self, logits_CW: Tensor, rows: slice) -> Tensor:
        """This shard's part, [C, M] in the math dtype: (max z, sum e^(z - max), the same of t, cross sum).

        z and t are the scaled logits of student and teacher. a are those that the divergence is an expectation over, b
        the others. The cross sum is that of e^(a - max a) ((a - max a) - (b - max b)); 0 for the JSD.
        """
        # The teacher's logits of the chunk. They are kept until `gradient` ends the chunk.
        teacher_CU = self._teacher_logits(rows, math_dtype(logits_CW))
        self._chunks[self._slot(rows)] = _Chunk(rows, teacher_CU)
        student_CU = scaled_logits(logits_CW, self._kernel.shard, self._kernel.scaling)[:, : self._common]
        if self._common == 0:
            partials_C5 = student_CU.new_zeros(len(student_CU), 5)
            partials_C5[:, :3:2] = LEAST_LOGIT  # both maxima
            return partials_C5
        # Pass 1 over both: maxima, sums of exponentials, cross sum. In place where a buffer is not needed again.
        student_max_C, teacher_max_C = student_CU.amax(dim=1), teacher_CU.amax(dim=1)
        z_CU, t_CU = student_CU.sub_(student_max_C[:, None]), teacher_CU - teacher_max_C[:, None]
        a_CU, b_CU = (z_CU, t_CU) if self._divergence == "rkl" else (t_CU, z_CU)
        b_sum_C = b_CU.exp().sum(dim=1)
        weight_CU = a_CU.exp()
        a_sum_C = weight_CU.sum(dim=1)
        if self._divergence == "jsd":
            cross_C = torch.zeros_like(a_sum_C)
        else:
            cross_C = weight_CU.mul_(a_CU.sub_(b_CU)).sum(dim=1)
        student_sum_C, teacher_sum_C = (a_sum_C, b_sum_C) if self._divergence == "rkl" else (b_sum_C, a_sum_C)
        return torch.stack([student_max_C, student_sum_C, teacher_max_C, teacher_sum_C, cross_C], dim=1)

    @torch.no_grad()
    def value(self, stats_CN3: Tensor, partials_CNM: Tensor, lse_C: Tensor, logits_CW: Tensor, rows: slice) -> Tensor:
        """The divergence of each row, [C], nats.

        The student's statistics of the support are not used. They are over all real columns, but this softmax is over
        the columns in common.
        """
        student_max_CN, student_sum_CN, teacher_max_CN, teacher_sum_CN, cross_CN = partials_CNM.unbind(dim=2)
        student = _Normaliser.merged(student_max_CN, student_sum_CN)
        teacher = _Normaliser.merged(teacher_max_CN, teacher_sum_CN)
        chunk = replace(self._chunk(rows), student=student, teacher=teacher)
        if self._divergence == "jsd":
            # beta KL(q || mix) + (1 - beta) KL(p || mix): a second all-reduce, which every rank of the group joins.
            from_teacher_C, mean_C = self._divergences_from_mixture(chunk, logits_CW)
            value_C = self._beta * from_teacher_C + (1.0 - self._beta) * mean_C
        else:
            # gap = (max z - Z_z) - (max t - Z_t) of each shard: (A - Z_a) - (B - Z_b) for RKL, minus that for FKL.
            gap_CN = student.log_probs_(student_max_CN.clone()) - teacher.log_probs_(teacher_max_CN.clone())
            if self._divergence == "rkl":
                mean_C = _merged_mean(student_max_CN, student_sum_CN, cross_CN + student_sum_CN * gap_CN)
            else:
                mean_C = _merged_mean(teacher_max_CN, teacher_sum_CN, cross_CN - teacher_sum_CN * gap_CN)
            value_C = mean_C.clone()
        value_C.masked_fill_(value_C > IMPOSSIBLE, torch.inf)
        self._chunks[self._slot(rows)] = replace(chunk, mean_C1=mean_C[:, None])
        return value_C

    @torch.no_grad()
    def gradient(self, logits_CW: Tensor, grad_C: Tensor, rows: slice) -> Tensor:
        """grad_C times its derivative in the scaled logits of the real columns, [C, R] in the math dtype.

        The derivative is p - q for fkl, p (log p - log q - D) for rkl and (1 - beta) p (log p - log mix - D) for jsd,
        with D the expectation over p of the log-ratio beside it; 0 in columns that are not in common. This call
        overwrites the teacher's logits and ends the chunk.
        """
        # The jsd: its derivative in p_v is (1 - beta) (log(p_v / mix_v) + 1 - (beta q_v + (1 - beta) p_v) / mix_v), and
        # the last fraction is 1. Through the softmax, f_v = log(p_v / mix_v) becomes p_v (f_v - sum_w p_w f_w).
        chunk, slot = self._chunk(rows), self._slot(rows)
        assert chunk.student is not None and chunk.teacher is not None and chunk.mean_C1 is not None
        self._chunks[slot] = None
        grad_CR = scaled_logits(logits_CW, self._kernel.shard, self._kernel.scaling)
        logp_CU = chunk.student.log_probs_(grad_CR[:, : self._common])  # a view: what follows writes the result
        logq_CU = chunk.teacher.log_probs_(chunk.teacher_CU)
        if self._divergence == "fkl":
            logp_CU.exp_().sub_(logq_CU.exp_())
        else:
            other_CU = logq_CU if self._divergence == "rkl" else log_mixture(logp_CU, logq_CU, self._beta)
            excess_CU = (logp_CU - other_CU).sub_(chunk.mean_C1)
            logp_CU.exp_().mul_(excess_CU)
        factor_C = grad_C if self._divergence != "jsd" else grad_C * (1.0 - self._beta)
        logp_CU.mul_(factor_C[:, None])
        grad_CR[:, self._common :] = 0.0
        return grad_CR

    def _divergences_from_mixture(self, chunk: _Chunk, logits_CW: Tensor) -> tuple[Tensor, Tensor]:
        """KL(q || mix) and KL(p || mix), [C] each. One SUM all-reduce of [C, 2 N] numbers, one slot per rank."""
        assert chunk.student is not None and chunk.teacher is not None
        kernel = self._kernel
        logp_CU = chunk.student.log_probs_(scaled_logits(logits_CW, kernel.shard, kernel.scaling)[:, : self._common])
        logq_CU = chunk.teacher.log_probs_(chunk.teacher_CU.clone())
        mixture_CU = log_mixture(logp_CU, logq_CU, self._beta)
        slots_C2N = logp_CU.new_zeros(len(logp_CU), 2, kernel.group.size())
        slots_C2N[:, 0, kernel.group.rank()] = logq_CU.exp().mul_(logq_CU.sub_(mixture_CU)).sum(dim=1)
        slots_C2N[:, 1, kernel.group.rank()] = logp_CU.exp().mul_(logp_CU.sub_(mixture_CU)).sum(dim=1)
        all_reduce(slots_C2N, kernel.group)
        teacher_C, student_C = slots_C2N.sum(dim=2).unbind(dim=1)
        return teacher_C, student_C

    def _teacher_logits(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """t of the columns in common, [C, U], in a buffer of this object, valid until the slot's next chunk."""
        slot, source = self._slot(rows), self._teacher
        buffer = self._buffers[slot]
        if buffer is None:
            device = source.logits_TW.device if isinstance(source, GivenLogits) else source.hidden_TD.device
            longest = min(self._kernel.chunk_tokens, source.tokens)
            buffer = torch.empty(longest, self._teacher_width, dtype=dtype, device=device)
            self._buffers[slot] = buffer
        logits_CW = source.logits(rows, out=buffer)
        if isinstance(source, GivenLogits):
            logits_CW = buffer[: len(logits_CW)].copy_(logits_CW)
        return self._teacher_scaling.apply_(logits_CW[:, : self._common].clamp_(min=LEAST_LOGIT))

    def _slot(self, rows: slice) -> int:
        return rows.start // self._kernel.chunk_tokens % len(self._buffers)

    def _chunk(self, rows: slice) -> _Chunk:
        chunk = self._chunks[self._slot(rows)]
        assert chunk is not None and chunk.rows == rows, f"no partials were made of rows {rows}"
        return chunk


@dataclass(frozen=True)
class _Normaliser:
    """Logsumexp = max + log_sum, [C, 1] each. They are kept apart, because their sum would round log_sum to the
    resolution of max."""

    max_C1: Tensor
    log_sum_C1: Tensor

    @classmethod
    def merged(cls, max_CN: Tensor, sum_CN: Tensor) -> _Normaliser:
        """From max z and sum of e^(z - max) of all shards."""
        max_C1 = max_CN.amax(dim=1, keepdim=True)
        return cls(max_C1, ((max_CN - max_C1).exp() * sum_CN).sum(dim=1, keepdim=True).log())

    def log_probs_(self, logits: Tensor) -> Tensor:
        """Logits to log-probs, in place."""
        return logits.sub_(self.max_C1).sub_(self.log_sum_C1)


@dataclass(frozen=True)
class _Chunk:
    """The state of a chunk between the three calls. `value` sets the last three fields."""

    rows: slice
    teacher_CU: Tensor
    """t"""
    student: _Normaliser | None = None
    teacher: _Normaliser | None = None
    mean_C1: Tensor | None = None
    """D of `gradient`: the value of fkl and rkl, KL(p || mix) of the JSD"""


def _common_columns(student: VocabShard, teacher: VocabShard) -> int:
    """Return U if the ids in common are the same on this rank. Raises ModelError with both ranges otherwise."""
    vocabulary = min(student.vocab_size, teacher.vocab_size)
    ours, theirs = (range(shard.start, min(shard.stop, vocabulary)) for shard in (student, teacher))
    if ours == theirs:
        return len(ours)
    raise ModelError(
        f"a divergence over the whole vocabulary needs the same ids of student and teacher on each rank, found "
        f"[{student.start}, {student.stop}) and [{teacher.start}, {teacher.stop}) of {vocabulary}: their vocabularies "
        "are padded differently; set objective.full_vocabulary=false or parallel.tensor=1"
    )


def _merged_mean(max_CN: Tensor, sum_CN: Tensor, weighted_CN: Tensor) -> Tensor:
    """Expectation [C] of f over softmax(a), from each shard's sums of e^(a - max a) f and of e^(a - max a)."""
    weight_CN = (max_CN - max_CN.amax(dim=1, keepdim=True)).exp()
    return (weight_CN * weighted_CN).sum(dim=1) / (weight_CN * sum_CN).sum(dim=1)


def log_mixture(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p); exactly log p where p = q, and differentiable there too."""
    # With d = log q - log p: mix = p (1 + beta (e^d - 1)) = q (1 + (1 - beta) (e^-d - 1)). The form with the negative
    # exponent is used. The clamp keeps the other one finite, because `where` would pass its NaN on to the gradient.
    below = logp + torch.log1p(beta * torch.expm1((logq - logp).clamp_max(0.0)))
    above = logq + torch.log1p((1.0 - beta) * torch.expm1((logp - logq).clamp_max(0.0)))
    return torch.where(logq <= logp, below, above)
