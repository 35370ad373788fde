"""Measures how far the student is from the teacher on stored responses of the teacher that it does not train on.

Nothing is sampled. The teacher scores the responses once, at the first measurement of a run; its scores are kept in the
run directory. Each measurement is then one forward pass of the student. Invariants: a measurement changes nothing that
training reads, and draws no random number. It uses the weights as they are at the start of a step, so a repeated step
gives the same number.

Legend: T rows, K teacher top-k.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tropd_mcore.config.schema import HeldOutConfig
from tropd_mcore.data.packing import PackedStep
from tropd_mcore.kernel.source import OutputLayer
from tropd_mcore.kernel.support_log_probs import support_log_probs
from tropd_mcore.library.inputs import without_neginf
from tropd_mcore.mcore.collective import gather_on_rank_zero
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.pipeline import only_measure, run_pipeline
from tropd_mcore.objectives.parts.divergences import topk_forward_kl
from tropd_mcore.sentinels import ABSENT, NO_ENTRY
from tropd_mcore.teacher.megatron import MegatronTeacher
from tropd_mcore.teacher.score_source import ScoreSource
from tropd_mcore.types import HeldOutDistance, MicroBatch, Rollout, TeacherScores

log = logging.getLogger(__name__)

Sums = tuple[float, float, float, float, int, int]
"""Of one rank: KL, r, teacher mass, -log p, scored tokens, tokens."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out responses of this rank, and what measures them."""

    config: HeldOutConfig
    last_step: int
    """The last step of the run, which always has a measurement"""
    student: Model
    settings: LossSettings
    rollouts: list[Rollout]
    packed: PackedStep
    scores: ScoreSource | None
    """Provides the teacher's scores; None if no teacher can be asked"""

    def at_step(self, step: int) -> HeldOutDistance | None:
        """Return the distance before the updates of `step`, on rank 0; None on other ranks and steps. Collective."""
        if step % self.config.every and step != self.last_step:
            return None
        micro_batches = self.packed.micro_batches
        scores: list[TeacherScores | None] = [None] * len(micro_batches)
        if self.scores is not None:
            scores = self.scores.at_step(0, self.rollouts, self.packed, [None] * len(micro_batches), [])
        layout = self.student.layout
        measured = run_pipeline(
            self.student,
            micro_batches,
            self.packed.pack_length,
            loss=only_measure(_measure(self.student, self.settings, scores)),
            forward_only=True,
        )
        mine: list[Sums] = []
        if layout.is_last_stage and layout.tp_rank == 0:
            mine = [_sums(found) for found in measured if found is not None]
        parts = gather_on_rank_zero(mine, layout.groups.control)
        if layout.rank != 0:
            return None
        return _distance([sums for part in parts for sums in part], len(self.rollouts))


@dataclass(frozen=True)
class _Rows:
    """The numbers of the rows of one micro-batch, float64 [T]; the first three only of rows that have scores."""

    kl_T: Tensor
    log_ratio_T: Tensor
    teacher_mass_T: Tensor
    nll_T: Tensor


def _measure(
    student: Model, settings: LossSettings, scores: Sequence[TeacherScores | None]
) -> Callable[[OutputLayer, MicroBatch, int], _Rows]:
    """Return the measure of a micro-batch. Its scores are None if the teacher was not asked."""
    kernel = settings.kernel(student, temperature=settings.temperature)

    def measure(layer: OutputLayer, micro_batch: MicroBatch, index: int) -> _Rows:
        scored, ids_TJ = scores[index], micro_batch.target_ids_T[:, None]
        if scored is None:
            logp_TJ, _ = support_log_probs(settings.source(student, layer), ids_TJ, kernel, unique_run_lengths=(1,))
            nothing = logp_TJ.new_zeros(0).double()
            return _Rows(nothing, nothing, nothing, -logp_TJ[:, 0].double())
        known_TK = (scored.topk_ids_TK >= 0) & (scored.topk_ids_TK < student.shard.vocab_size)
        ids_TJ = torch.cat([ids_TJ, scored.topk_ids_TK.masked_fill(~known_TK, NO_ENTRY)], dim=1)
        runs = (1, ids_TJ.shape[1] - 1)
        logp_TJ, _ = support_log_probs(settings.source(student, layer), ids_TJ, kernel, unique_run_lengths=runs)
        logp_TJ = logp_TJ.double()
        teacher_TK = scored.topk_logp_TK.double().masked_fill(~known_TK, ABSENT)
        kl_T = topk_forward_kl(logp_TJ[:, 1:], teacher_TK, norm="tail")
        log_ratio_T = without_neginf(scored.logp_T).double() - logp_TJ[:, 0]
        mass_T, has_T = teacher_TK.exp().sum(dim=1), scored.scored_T
        return _Rows(kl_T[has_T], log_ratio_T[has_T], mass_T[has_T], -logp_TJ[:, 0])

    return measure


def _sums(rows: _Rows) -> Sums:
    return (
        float(rows.kl_T.sum()),
        float(rows.log_ratio_T.sum()),
        float(rows.teacher_mass_T.sum()),
        float(rows.nll_T.sum()),
        len(rows.kl_T),
        len(rows.nll_T),
    )


def _distance(parts: Sequence[Sums], responses: int) -> HeldOutDistance:
    kl, log_ratio, mass, nll, scored, tokens = (sum(column) for column in zip(*parts, strict=True))
    unknown = float("nan")
    return HeldOutDistance(
        forward_kl=kl / scored if scored else unknown,
        sampled_kl=log_ratio / scored if scored else unknown,
        teacher_mass=mass / scored if scored else unknown,
        nll=nll / tokens,
        tokens=int(tokens),
        unscored=int(tokens - scored),
        responses=responses,
    )


class LoadedOnce:
    """A teacher that `load` makes for one scoring and that is freed after it."""

    def __init__(self, load: Callable[[], MegatronTeacher]) -> None:
        self._load = load

    def score(
        self,
        rollouts: list[Rollout],
        packed: PackedStep,
        own_ids: Sequence[Tensor | None],
        verdicts: Sequence[bool | None],
    ) -> list[TeacherScores | None]:
        """Return the scores of each micro-batch; None on all but the last stage. Collective."""
        log.info("held_out: loading the teacher once, to score the held-out responses")
        found = self._load().score(rollouts, packed, own_ids, verdicts)
        gc.collect()  # the model's parts refer to each other
        return found
