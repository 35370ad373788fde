"""Per-row values that are computed once per rollout batch, before its first update.

These are the log-probs of the student before the update, those of the reference model, and statistics that depend on
other tokens of the batch. This module does not compute the teacher's scores (`score_source`). Invariants: no value
depends on how the batch is divided into updates or packs. A repeated step computes the same numbers from the
checkpointed weights.

Shapes: T rows of a micro-batch, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tropd_mcore.config.derived import needs_student_pass
from tropd_mcore.config.schema import Config
from tropd_mcore.data.groups import prompt_indices
from tropd_mcore.data.packing import PackedStep
from tropd_mcore.data.verdicts import Verdict, rewards
from tropd_mcore.library.inputs import without_neginf
from tropd_mcore.mcore.collective import gather_on_rank_zero, on_rank_zero
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.scoring import sampled_log_probs, student_pass
from tropd_mcore.objectives.parts.batch_statistics import BatchRows, statistic_of
from tropd_mcore.types import MicroBatch, Rollout, RowContext, StudentPass, TeacherScores

Columns = dict[str, npt.NDArray[np.generic]]


class BatchContextSource:
    """Computes the student's pass, the reference's log-probs and the objective's statistic; `reference` is frozen."""

    def __init__(self, config: Config, student: Model, reference: Model | None) -> None:
        self._config = config
        self._settings = LossSettings.from_config(config)
        self._student = student
        self._reference = reference
        self._layout = student.layout

    def student(self, packed: PackedStep) -> list[StudentPass | None]:
        """Score the rollouts with the student before the update; None per micro-batch if not needed. Collective."""
        if not needs_student_pass(self._config):
            return [None] * len(packed.micro_batches)
        student_topk = self._config.objective.student_candidates
        return student_pass(
            self._student, packed.micro_batches, packed.pack_length, student_topk=student_topk, settings=self._settings
        )

    def complete(
        self,
        step: int,
        rollouts: list[Rollout],
        packed: PackedStep,
        passes: Sequence[StudentPass | None],
        scores: Sequence[TeacherScores | None],
        verdicts: Sequence[Verdict],
    ) -> list[RowContext | None]:
        """Return the context of each micro-batch; None on all but the last stage. Collective.

        `verdicts` are the verdicts on the rollouts; only rank 0 reads them.
        """
        reference = self._reference_logp(packed)
        statistics = self._statistics(step, rollouts, packed.micro_batches, passes, scores, verdicts)
        return [
            _row_context(found, scored, reference_T, statistic_T) if scored is not None else None
            for found, scored, reference_T, statistic_T in zip(passes, scores, reference, statistics, strict=True)
        ]

    def _reference_logp(self, packed: PackedStep) -> list[Tensor | None]:
        if self._reference is None:
            return [None] * len(packed.micro_batches)
        return sampled_log_probs(self._reference, packed.micro_batches, packed.pack_length, settings=self._settings)

    def _statistics(
        self,
        step: int,
        rollouts: list[Rollout],
        micro_batches: Sequence[MicroBatch],
        passes: Sequence[StudentPass | None],
        scores: Sequence[TeacherScores | None],
        verdicts: Sequence[Verdict],
    ) -> list[Tensor | None]:
        """Return the statistic of each micro-batch's rows. Rank 0 computes it from the rows of all ranks.

        Cost: one gather to rank 0 and one broadcast of a float32 per token of the batch.
        """
        statistic = statistic_of(self._config.objective, step / self._config.run.steps)
        if statistic is None:
            return [None] * len(micro_batches)
        # Phase 1: gather the rows on rank 0. Every rank takes part; ranks without rows send {}.
        layout = self._layout
        mine: Columns = {}
        if layout.is_last_stage and layout.tp_rank == 0:
            mine = _columns(micro_batches, passes, scores)
        parts = gather_on_rank_zero(mine, layout.groups.control)
        # Phase 2: rank 0 computes the statistic, and all ranks receive it. A token's place is its position in the
        # concatenated rollouts, which does not depend on the packs.
        starts = np.cumsum([0, *(len(rollout.token_ids) for rollout in rollouts)])

        def on_all_tokens() -> npt.NDArray[np.float32]:
            """Return the statistic by place in the concatenated rollouts; 0 for tokens without a row."""
            rows = _batch_rows(parts, rollouts, verdicts)
            values = np.zeros(starts[-1], dtype=np.float32)
            values[starts[rows.sample_index_T] + rows.token_index_T] = statistic(rows)
            return values

        values = on_rank_zero(on_all_tokens, layout.groups.control)
        # Phase 3: each rank of the last stage picks the values of its rows.
        if not layout.is_last_stage:
            return [None] * len(micro_batches)
        return [_rows_of(values, starts, micro_batch) for micro_batch in micro_batches]


def _row_context(
    found: StudentPass | None, scores: TeacherScores, reference_T: Tensor | None, statistic_T: Tensor | None
) -> RowContext:
    if found is None:
        return RowContext(reference_logp_T=reference_T, statistic_T=statistic_T)
    has_candidates = found.own_ids_TL.shape[1] > 0
    return RowContext(
        old_logp_T=found.logp_T,
        reference_logp_T=reference_T,
        statistic_T=statistic_T,
        own_ids_TL=found.own_ids_TL if has_candidates else None,
        old_own_logp_TL=found.own_logp_TL if has_candidates else None,
        teacher_own_logp_TL=scores.logp_of_student_topk_TL,
    )


def _columns(
    micro_batches: Sequence[MicroBatch],
    passes: Sequence[StudentPass | None],
    scores: Sequence[TeacherScores | None],
) -> Columns:
    """Return the columns of `BatchRows` for this rank's rows."""
    pieces: dict[str, list[Tensor]] = {}
    for micro_batch, found, scored in zip(micro_batches, passes, scores, strict=True):
        assert found is not None and scored is not None, "a statistic needs the student's pass and the teacher's scores"
        columns = {
            "sample_index_T": micro_batch.sample_index_T,
            "token_index_T": micro_batch.token_index_T,
            "on_T": micro_batch.student_mask_T & scored.scored_T,
            "student_entropy_T": found.entropy_T.double(),
            "old_logp_T": found.logp_T.double(),
            "rollout_logp_T": micro_batch.rollout_logp_T.double(),
            "teacher_logp_T": without_neginf(scored.logp_T).double(),
        }
        for name, column in columns.items():
            pieces.setdefault(name, []).append(column)
    return {name: torch.cat(columns).cpu().numpy() for name, columns in pieces.items()}


def _batch_rows(parts: Sequence[Columns], rollouts: list[Rollout], verdicts: Sequence[Verdict]) -> BatchRows:
    filled = [part for part in parts if part]
    columns = {name: np.concatenate([part[name] for part in filled]) for name in filled[0]}
    return BatchRows(**columns, prompt_index_S=prompt_indices(rollouts), reward_S=rewards(verdicts))


def _rows_of(values: npt.NDArray[np.float32], starts: npt.NDArray[np.int64], micro_batch: MicroBatch) -> Tensor:
    sample, token = micro_batch.sample_index_T.cpu().numpy(), micro_batch.token_index_T.cpu().numpy()
    return torch.from_numpy(values[starts[sample] + token]).to(micro_batch.sample_index_T.device)
