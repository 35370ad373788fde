"""What an objective sees of the rows of one micro-batch beside the student's log-probs: numbers without gradients.

Not for the student's own numbers, which the kernel makes chunk by chunk. Invariants: a candidate that the student's
vocabulary does not have is in no support, and ABSENT among the teacher's log-probs; log q of a sampled token is never
-inf, which only a candidate's may be, and a NaN stays one.

Legend: T rows, C rows of a chunk, K teacher top-k, L student top-k, J = 1 + K + L support ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.sentinels import ABSENT, LOGP_FLOOR, NO_ENTRY
from tropd_mcore.types import MicroBatch, RowContext, TeacherScores


@dataclass(frozen=True)
class TokenInputsBuilder:
    """The constant columns of `TokenInputs` by name, all rows; what is not known before the forward pass is missing."""

    columns: dict[str, Tensor]
    impossible_T: Tensor
    """bool, rows that count and whose token the teacher gives no probability"""
    excluded_T: Tensor
    """float32, candidates of the teacher that the student's tokenizer lacks; NaN where there are no such tokens"""

    @classmethod
    def of(cls, batch: MicroBatch, scored: TeacherScores, context: RowContext, vocab_size: int) -> TokenInputsBuilder:
        """From the pack, the teacher and the passes before the first update; `vocab_size` is the student's.

        The uniform of an impossible token is 1, which a Bernoulli gate distrusts; it would trust the token at 0.
        """
        known_TK = scored.topk_ids_TK < vocab_size
        nothing_TL = scored.logp_T.new_zeros(len(scored.logp_T), 0)
        unknown_T = torch.full_like(scored.logp_T, torch.nan)
        own_ids_TL, teacher_own_logp_TL = context.own_ids_TL, context.teacher_own_logp_TL
        if own_ids_TL is None:
            own_ids_TL, teacher_own_logp_TL = nothing_TL.to(torch.int64), nothing_TL
        assert teacher_own_logp_TL is not None, "the teacher was not asked for the student's own candidates"
        on_T, off_T = batch.student_mask_T & scored.scored_T, batch.prefix_mask_T & scored.scored_T
        impossible_T = scored.logp_T.isneginf() & (on_T | off_T)
        columns = {
            "teacher_logp_T": without_neginf(scored.logp_T),
            "teacher_topk_logp_TK": scored.topk_logp_TK.masked_fill(~known_TK, ABSENT),
            "teacher_own_logp_TL": teacher_own_logp_TL,
            "teacher_entropy_T": _or(scored.entropy_T, unknown_T),
            "topk_ids_TK": torch.where(known_TK, scored.topk_ids_TK, NO_ENTRY),
            "own_ids_TL": own_ids_TL,
            "target_ids_T": batch.target_ids_T,
            "reference_logp_T": _or(context.reference_logp_T, unknown_T),
            "rollout_logp_T": batch.rollout_logp_T,
            "statistic_T": _or(context.statistic_T, torch.ones_like(scored.logp_T)),
            "trust_u_T": batch.trust_u_T.masked_fill(impossible_T, 1.0),
            "student_mask_T": on_T,
            "prefix_mask_T": off_T,
            "weight_T": batch.weight_T,
        }
        before = {"old_logp_T": context.old_logp_T, "old_own_logp_TL": context.old_own_logp_TL}
        known_before = {name: column for name, column in before.items() if column is not None}
        excluded_T = unknown_T if scored.excluded_T is None else scored.excluded_T.to(torch.float32)
        return cls(columns | known_before, impossible_T, excluded_T)

    @property
    def topk_ids_TK(self) -> Tensor:
        """The teacher's candidates, NO_ENTRY where the student's vocabulary does not have them."""
        return self.columns["topk_ids_TK"]

    @property
    def own_ids_TL(self) -> Tensor:
        """The student's candidates; L = 0 where none are asked for."""
        return self.columns["own_ids_TL"]

    @property
    def ids_TJ(self) -> Tensor:
        """The support: sampled token, teacher's candidates, student's candidates."""
        return torch.cat([self.columns["target_ids_T"][:, None], self.topk_ids_TK, self.own_ids_TL], dim=1)

    @property
    def unique_run_lengths(self) -> tuple[int, ...]:
        """Runs of the support in which no id appears twice."""
        return tuple(size for size in (1, self.topk_ids_TK.shape[1], self.own_ids_TL.shape[1]) if size)

    @property
    def unknown_T(self) -> Tensor:
        """NaN for every row."""
        return torch.full_like(self.columns["teacher_logp_T"], torch.nan)

    def inputs(self, logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenInputs:
        """The inputs of these rows, with the student's numbers; without a student pass these are also the old ones."""
        k, own = self.topk_ids_TK.shape[1], self.own_ids_TL.shape[1]
        sampled_C1, topk_CK, own_CL = logp_CJ.split([1, k, own], dim=1)
        before = {"old_logp_T": sampled_C1[:, 0].detach(), "old_own_logp_TL": own_CL.detach()}
        constant = before | {name: column[rows] for name, column in self.columns.items()}
        return TokenInputs(
            student_logp_T=sampled_C1[:, 0],
            student_topk_logp_TK=topk_CK,
            student_own_logp_TL=own_CL,
            student_entropy_T=entropy_C,
            divergence_T=divergence_C,
            **constant,
        )

    def observed(self) -> dict[str, Tensor]:
        """The reported columns that are inputs of the objective rather than its results."""
        return {
            "on": self.columns["student_mask_T"],
            "off": self.columns["prefix_mask_T"],
            "impossible": self.impossible_T,
            "excluded": self.excluded_T,
            "teacher_logp": self.columns["teacher_logp_T"],
            "teacher_entropy": self.columns["teacher_entropy_T"],
        }


def without_neginf(logp_T: Tensor) -> Tensor:
    """Return log q of the sampled tokens with LOGP_FLOOR in place of -inf; every other number is left as it is.

    An impossible token would have a reward of -inf, and the loss would be no number. Source: docs/objectives.md.
    """
    return logp_T.masked_fill(logp_T.isneginf(), LOGP_FLOOR)


def _or(column: Tensor | None, default: Tensor) -> Tensor:
    return default if column is None else column
