"""Provides the teacher scores of a step: from the run directory if it was scored before, otherwise from the teacher.

Invariant: saved scores are used only if every rank finds its own, for exactly its rows, teacher and candidates.
Otherwise all ranks score again, which keeps their collectives in step. Each reason is logged once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tropd_mcore.data.packing import PackedStep
from tropd_mcore.data.verdicts import Verdict
from tropd_mcore.mcore.collective import all_agree, gather_on_rank_zero, raise_on_all_ranks
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.records.replay import ScoreKey, load_scores, mismatch, save_scores
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.types import Rollout, StudentPass, TeacherScores

log = logging.getLogger(__name__)


class Teacher(Protocol):
    """An object that scores packs. Its methods are collective over all ranks."""

    def score(
        self,
        rollouts: list[Rollout],
        packed: PackedStep,
        own_ids: Sequence[Tensor | None],
        verdicts: Sequence[Verdict],
    ) -> list[TeacherScores | None]:
        """Return the scores of each micro-batch in order; None on all but the last stage.

        `own_ids[i]`, int64 [T, L]: the student's top-k candidates of micro-batch i; None if they are not needed.
        `verdicts` are the verdicts of the rollouts; they are used on rank 0 only.
        """
        ...


class ScoreSource:
    """Teacher scores by step, kept on disk until no resume can need them.

    `name` identifies the teacher (`inputs.teacher_name`). With `on_disk=False`, scores are never saved and always
    computed again. This is for a deterministic teacher whose scores hold hidden states, or whose weights change, so
    that scores of another run would not be its own. `place` gives the file of a step's scores on a rank.
    """

    def __init__(
        self,
        teacher: Teacher,
        run_dir: RunDir,
        layout: Layout,
        *,
        replay: Path | None,
        name: str,
        on_disk: bool,
        place: Callable[[RunDir, int, int, int], Path] = RunDir.scores,
    ) -> None:
        self._teacher = teacher
        self._run_dir = run_dir
        self._layout = layout
        self._replay = RunDir(replay) if replay is not None else None
        self._name = name
        self._on_disk = on_disk
        self._place = place
        self._told: set[str] = set()
        """Reasons for not using saved scores that were logged already."""

    def at_step(
        self,
        step: int,
        rollouts: list[Rollout],
        packed: PackedStep,
        passes: Sequence[StudentPass | None],
        verdicts: Sequence[Verdict],
    ) -> list[TeacherScores | None]:
        """Return the scores of this rank's micro-batches; None on all but the last stage. Collective.

        `passes` hold the student's top-k candidates, whose log q is part of the scores. For `verdicts` see
        `Teacher.score`.
        """
        own_ids = [found.own_ids_TL if found is not None and found.own_ids_TL.shape[1] else None for found in passes]
        if not self._on_disk:
            return self._teacher.score(rollouts, packed, own_ids, verdicts)
        key = ScoreKey(self._names(rollouts), packed.micro_batches, own_ids)
        stored = self._stored(step, key)
        if stored is not None:
            return stored
        scores = self._teacher.score(rollouts, packed, own_ids, verdicts)
        with raise_on_all_ranks(self._layout.groups.control):
            present = [score for score in scores if score is not None]
            if self._layout.is_last_stage and self._layout.tp_rank == 0:
                self._run_dir.check_held()
                save_scores(self._paths(step)[0], key, present)
        return scores

    def are_stored(self, step: int, rollouts: Sequence[Rollout], packed: PackedStep) -> bool:
        """Whether the scores of these packs are saved, without the student's top-k candidates. Collective."""
        key = ScoreKey(self._names(rollouts), packed.micro_batches, [None] * len(packed.micro_batches))
        layout, found = self._layout, True
        with raise_on_all_ranks(layout.groups.control):
            if layout.is_last_stage:
                found = any(path.exists() and mismatch(path, key) is None for path in self._paths(step))
        return all_agree(found, layout.groups.control)

    def _names(self, rollouts: Sequence[Rollout]) -> str:
        """Text that identifies the teacher, or several and which of the rollouts each of them scores."""
        named = [rollout.teacher for rollout in rollouts]
        if all(teacher is None for teacher in named):
            return self._name
        return f"{self._name} samples={hashlib.sha256(repr(named).encode()).hexdigest()[:16]}"

    def _stored(self, step: int, key: ScoreKey) -> list[TeacherScores | None] | None:
        """The saved scores if every rank of the last stage has them on disk, otherwise None."""
        layout = self._layout
        found: list[TeacherScores] | None = None
        reasons: list[str] = []
        with raise_on_all_ranks(layout.groups.control):
            if layout.is_last_stage:
                found, reasons = self._read(step, key)
        if not all_agree(found is not None or not layout.is_last_stage, layout.groups.control):
            self._tell(step, reasons if found is None else ["there for some ranks only"])
            return None
        return list(found) if found is not None else [None] * len(key.micro_batches)

    def _read(self, step: int, key: ScoreKey) -> tuple[list[TeacherScores] | None, list[str]]:
        """This rank's saved scores, or the reasons why the saved scores do not fit."""
        reasons = []
        for path in self._paths(step):
            if not path.exists():
                continue
            reason = mismatch(path, key)
            if reason is None:
                return load_scores(path, key), []
            reasons.append(f"{reason} in {path.parent}")
        return None, reasons

    def _tell(self, step: int, reasons: list[str]) -> None:
        """Log on rank 0 why saved scores of a step are not used, if there are any. Collective."""
        everywhere = gather_on_rank_zero(reasons, self._layout.groups.control)
        for reason in sorted(set().union(*everywhere) - self._told):
            self._told.add(reason)
            log.warning("step %d: the teacher scores again: stored scores are %s (logged once)", step, reason)

    def _paths(self, step: int) -> list[Path]:
        """Files that may hold the scores of this rank's packs; the file of this run is first."""
        run_dirs = [self._run_dir, *([self._replay] if self._replay is not None else [])]
        return [self._place(run_dir, step, self._layout.dp_rank, self._layout.cp_rank) for run_dir in run_dirs]
