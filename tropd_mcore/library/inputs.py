"""The constant inputs of an objective: per-token numbers without gradients, one row per token.

The student's own numbers are not here; the kernel computes them chunk by chunk. Invariants: a candidate that the
student's vocabulary lacks is in no support, and ABSENT among the teacher's log-probs. log q of a sampled token is never
-inf (only a candidate's may be), and a NaN stays NaN. Numbers that were not given are NaN.

Legend: T tokens, C tokens of a chunk, K teacher top-k, L student top-k, J support ids: x if given, K, L.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd_mcore.library.arguments import TeacherTopK
from tropd_mcore.library.shapes import TokenNumbers
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.sentinels import ABSENT, LOGP_FLOOR, NO_ENTRY

OPTIONAL = ("reference_logp_T", "rollout_logp_T", "selected_T", "advantage_T", "history_weight_T", "trust_u_T")
"""Columns that an objective may need; NaN if they are not given."""


@dataclass(frozen=True)
class Constants:
    """The constant columns of `TokenInputs` by name, without those that only the forward pass can fill."""

    columns: dict[str, Tensor]
    impossible_T: Tensor
    """bool, tokens that count but have probability 0 under the teacher"""
    supervised_T: Tensor
    """bool, tokens in either mask, including those that the teacher could not score"""
    has_target: bool
    """Whether the support begins with x"""

    @classmethod
    def of(cls, teacher: TeacherTopK, numbers: TokenNumbers, *, vocab_size: int, dtype: torch.dtype) -> Constants:
        """Build them from T tokens in a row with both masks; `vocab_size` is the student's.

        The uniform of an impossible token is set to 1, so that a Bernoulli gate distrusts it. At 0 it would trust it.
        """
        student_mask_T, prefix_mask_T = numbers.student_mask_T, numbers.prefix_mask_T
        assert student_mask_T is not None and prefix_mask_T is not None, "both masks: TokenNumbers.in_a_row"
        student_topk, target_ids_T = numbers.student_topk, numbers.target_ids_T
        tokens, device = student_mask_T.shape[0], student_mask_T.device
        unknown_T = torch.full((tokens,), torch.nan, dtype=dtype, device=device)

        def known(number: Tensor | None) -> Tensor:
            return unknown_T if number is None else number.detach().to(dtype)

        logp_T = known(teacher.logp_T)
        ids_TK = _ids(teacher.ids_TK, tokens, device)
        logp_TK = unknown_T.new_zeros(tokens, 0) if teacher.logp_TK is None else teacher.logp_TK.detach().to(dtype)
        known_TK = (ids_TK >= 0) & (ids_TK < vocab_size) & ~logp_TK.isneginf()
        own_ids_TL = _ids(student_topk.ids_TL if student_topk else None, tokens, device)
        own_TL = (
            logp_TK.new_zeros(tokens, 0) if student_topk is None else student_topk.teacher_logp_TL.detach().to(dtype)
        )
        scored_T = torch.ones_like(student_mask_T) if teacher.scored_T is None else teacher.scored_T
        on_T, off_T = student_mask_T & scored_T, prefix_mask_T & scored_T & ~student_mask_T
        impossible_T = logp_T.isneginf() & (on_T | off_T)
        targets_T = (
            torch.full((tokens,), NO_ENTRY, device=device) if target_ids_T is None else target_ids_T.to(torch.int64)
        )
        columns = {
            "teacher_logp_T": without_neginf(logp_T),
            "teacher_topk_logp_TK": logp_TK.masked_fill(~known_TK, ABSENT),
            "teacher_own_logp_TL": own_TL,
            "teacher_entropy_T": known(teacher.entropy_T),
            "topk_ids_TK": torch.where(known_TK, ids_TK, NO_ENTRY),
            "own_ids_TL": own_ids_TL,
            "target_ids_T": targets_T,
            "student_mask_T": on_T,
            "prefix_mask_T": off_T,
            "weight_T": torch.ones_like(unknown_T) if numbers.weight_T is None else known(numbers.weight_T),
            **{name: known(getattr(numbers, name)) for name in OPTIONAL},
        }
        columns["trust_u_T"] = columns["trust_u_T"].masked_fill(impossible_T, 1.0)
        if numbers.old_logp_T is not None:
            columns["old_logp_T"] = known(numbers.old_logp_T)
        if student_topk is not None and student_topk.old_logp_TL is not None:
            columns["old_own_logp_TL"] = student_topk.old_logp_TL.detach().to(dtype)
        return cls(columns, impossible_T, student_mask_T | prefix_mask_T, target_ids_T is not None)

    @property
    def topk_ids_TK(self) -> Tensor:
        """The teacher's candidates; NO_ENTRY if the student's vocabulary lacks the id."""
        return self.columns["topk_ids_TK"]

    @property
    def own_ids_TL(self) -> Tensor:
        """The student's candidates; L = 0 if none are requested."""
        return self.columns["own_ids_TL"]

    @property
    def ids_TJ(self) -> Tensor:
        """The support: sampled token, teacher's candidates, student's candidates.

        A target outside the masks may be any number (-100), so its slot is unused.
        """
        target_T1 = self.columns["target_ids_T"].masked_fill(~self.supervised_T, NO_ENTRY)[:, None]
        return torch.cat([*([target_T1] if self.has_target else []), self.topk_ids_TK, self.own_ids_TL], dim=1)

    @property
    def unique_run_lengths(self) -> tuple[int, ...]:
        """Runs of the support in which no id appears twice."""
        sizes = (int(self.has_target), self.topk_ids_TK.shape[1], self.own_ids_TL.shape[1])
        return tuple(size for size in sizes if size)

    def inputs(self, logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenInputs:
        """Return the inputs of these tokens with the student's log-probs, which replace old ones if none are given."""
        sizes = [int(self.has_target), self.topk_ids_TK.shape[1], self.own_ids_TL.shape[1]]
        target_CX, topk_CK, own_CL = logp_CJ.split(sizes, dim=1)
        # 0 and not NaN: an objective that reads no target multiplies it by an advantage of 0.
        logp_C = target_CX[:, 0] if self.has_target else torch.zeros_like(entropy_C)
        before = {"old_logp_T": logp_C.detach(), "old_own_logp_TL": own_CL.detach()}
        constant = before | {name: column[rows] for name, column in self.columns.items()}
        return TokenInputs(
            student_logp_T=logp_C,
            student_topk_logp_TK=topk_CK,
            student_own_logp_TL=own_CL,
            student_entropy_T=entropy_C,
            divergence_T=divergence_C,
            **constant,
        )


def without_neginf(logp_T: Tensor) -> Tensor:
    """Return log q of the sampled tokens with LOGP_FLOOR in place of -inf; all other numbers are unchanged.

    Otherwise an impossible token would have a reward of -inf, and the loss would not be finite. Source:
    docs/objectives.md.
    """
    return logp_T.masked_fill(logp_T.isneginf(), LOGP_FLOOR)


def _ids(ids: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    return torch.empty(tokens, 0, dtype=torch.int64, device=device) if ids is None else ids.detach().to(torch.int64)
