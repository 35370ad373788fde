"""Several teachers in one run: each sample is scored, with all of its rows, by the teacher that its prompt names.

The teachers themselves are in `megatron` and `served`. A teacher gets packs that hold its own samples only, so no token
is scored by a teacher that it does not have, and teachers score one after the other. Invariants: all ranks ask the
teachers in the order of the configuration, and leave out the same ones. A row has the scores of exactly one teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tropd_mcore.data.packing import PackedStep
from tropd_mcore.data.verdicts import Verdict
from tropd_mcore.teacher.identity_check import TeacherCheck
from tropd_mcore.teacher.own_packs import BLANKS, Packing, TeacherPacks, by_micro_batch
from tropd_mcore.teacher.score_source import Teacher
from tropd_mcore.teacher.served import ServedTeacher
from tropd_mcore.types import Rollout, TeacherScores

UNKNOWN = {**BLANKS, "entropy_T": float("nan")}
"""The values of a row whose teacher does not give them."""


@dataclass(frozen=True)
class _Part:
    """The samples of one teacher."""

    samples: list[int]
    """Their indices in the step"""
    rollouts: list[Rollout]
    packs: TeacherPacks
    """Packs of this replica; `sample_index_T` is an index into `rollouts`"""


class TeacherSet:
    """Scores rollouts with `teachers`, by name. `packing` says how the samples of one teacher are packed."""

    def __init__(self, teachers: Mapping[str, Teacher], packing: Packing) -> None:
        self._teachers = dict(teachers)
        self._packing = packing

    @property
    def served(self) -> dict[str, ServedTeacher]:
        """The teachers that can fail on a sample, by name."""
        return {name: teacher for name, teacher in self._teachers.items() if isinstance(teacher, ServedTeacher)}

    def score(
        self,
        rollouts: list[Rollout],
        packed: PackedStep,
        own_ids: Sequence[Tensor | None],
        verdicts: Sequence[Verdict],
    ) -> list[TeacherScores | None]:
        """Return the scores of each micro-batch in order; None on all but the last stage. Collective.

        `own_ids` and `verdicts` as in `score_source.Teacher`. The entropy is NaN in the rows of teachers that do not
        give it, unless none of them does. Raises the errors of the teachers.
        """
        is_last = self._packing.layout.is_last_stage
        columns_R: dict[str, Tensor] = {}
        for name in self._asked(rollouts):
            part = self._part(name, rollouts, packed)
            candidates = part.packs.own_candidates(own_ids) if is_last else None
            found = self._teachers[name].score(
                part.rollouts,
                part.packs.packed,
                candidates or [None] * len(part.packs.packed.micro_batches),
                [verdicts[sample] for sample in part.samples] if verdicts else [],
            )
            if is_last:
                part.packs.put(found, columns_R, UNKNOWN)
        if not is_last:
            return [None] * len(packed.micro_batches)
        return by_micro_batch(columns_R, [len(batch.rows_T) for batch in packed.micro_batches])

    def lost(self, rollouts: list[Rollout], packed: PackedStep) -> set[int]:
        """Return the indices of rollouts that a served teacher could not score, as `ServedTeacher.lost`. Collective."""
        found: set[int] = set()
        for name in self._asked(rollouts):
            teacher = self._teachers[name]
            if isinstance(teacher, ServedTeacher):
                part = self._part(name, rollouts, packed)
                found |= {part.samples[index] for index in teacher.lost(part.rollouts, part.packs.packed)}
        return found

    def _asked(self, rollouts: Sequence[Rollout]) -> list[str]:
        """The teachers that have samples in this step, the same on all ranks; in a step without samples, the first."""
        named = {rollout.teacher for rollout in rollouts}
        return [name for name in self._teachers if name in named] or list(self._teachers)[:1]

    def _part(self, name: str, rollouts: list[Rollout], packed: PackedStep) -> _Part:
        samples = [index for index, rollout in enumerate(rollouts) if rollout.teacher == name]
        place = {sample: index for index, sample in enumerate(samples)}
        here = [sample for sample in self._packing.samples(packed) if sample in place]
        packs = TeacherPacks.of({sample: rollouts[sample] for sample in here}, rollouts, packed, self._packing)
        renumbered = packs.renumbered(np.array([place[sample] for sample in here] or [0], dtype=np.int64))
        return _Part(samples, [rollouts[sample] for sample in samples], renumbered)


class TeacherChecks:
    """The checks of several served teachers, one after the other (see `identity_check.TeacherCheck`)."""

    def __init__(self, checks: Mapping[str, TeacherCheck]) -> None:
        self.by_name = dict(checks)

    def at_step(self, step: int) -> None:
        """Check each teacher before the scores of `step`. Collective; raises GateError."""
        for check in self.by_name.values():
            check.at_step(step)

    def before_checkpoint(self, done: int) -> None:
        """Check each teacher before a checkpoint of `done` steps is written. Collective; raises GateError."""
        for check in self.by_name.values():
            check.before_checkpoint(done)
