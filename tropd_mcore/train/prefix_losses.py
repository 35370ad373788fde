"""Moves the loss of a teacher prefix to another sample if the teacher could not score the sample that carries it.

Samples of one prompt share their teacher prefix, and only one sample carries its loss. This module does not make the
first choice (`data.supervision`, `rollout_source`). Invariants: after `settle`, the prefix of a prompt with a scored
sample is supervised in exactly one scored sample. The decision is on disk before the step changes anything, so a
repeated step decides the same. If every sample was scored, nothing is asked twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from tropd_mcore.data.packing import PackedStep
from tropd_mcore.data.supervision import hand_over
from tropd_mcore.rollout.rollout_source import RolloutSource
from tropd_mcore.teacher.score_source import ScoreSource
from tropd_mcore.teacher.served import ServedTeacher
from tropd_mcore.teacher.teacher_set import TeacherSet
from tropd_mcore.types import Rollout

log = logging.getLogger(__name__)

Pack = Callable[[list[Rollout]], PackedStep]


class PrefixLosses:
    """Settles which samples carry prefix losses.

    `teacher` is None if there is no prefix loss, or if the teacher scores every sample or stops the run.
    """

    def __init__(
        self, teacher: ServedTeacher | TeacherSet | None, scores: ScoreSource, rollouts: RolloutSource
    ) -> None:
        self._teacher = teacher
        self._scores = scores
        self._rollouts = rollouts

    def settle(
        self, step: int, rollouts: list[Rollout], packed: PackedStep, pack: Pack
    ) -> tuple[list[Rollout], PackedStep]:
        """Return rollouts and packs in which scored samples carry the prefix losses. Collective.

        Pack lengths and places do not depend on the choice of carriers, so every sample stays on its rank. A sample
        that takes over was scored from its response on; the teacher is asked once more, from the end of the prompt.
        If scores are on disk, this was settled before they were stored.
        """
        if self._teacher is None or self._scores.are_stored(step, rollouts, packed):
            return rollouts, packed
        while True:
            lost = self._teacher.lost(rollouts, packed)
            moved = hand_over(rollouts, lost)
            if moved is None:
                return rollouts, packed
            log.info(
                "step %d: the teacher could not score the sample that carries the prefix loss of its prompt; another "
                "sample of the prompt takes over: %s",
                step,
                ", ".join(new.sample_id for new, old in zip(moved, rollouts, strict=True) if _takes_over(new, old)),
            )
            self._rollouts.save(step, moved)
            rollouts, packed = moved, pack(moved)


def _takes_over(new: Rollout, old: Rollout) -> bool:
    return new.carries_prefix_loss and not old.carries_prefix_loss
