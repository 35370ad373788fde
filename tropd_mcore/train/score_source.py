"""Where a step's teacher scores come from: the run directory if the step was scored before, else the teacher.

Invariant: scores on disk are used only where every rank finds its own, for exactly the rows it has; otherwise all ranks
score again, so that collectives stay in step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from tropd_mcore.data.packing import PackedStep
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.train.collective import all_agree, shared_fate
from tropd_mcore.train.replay import load_scores, save_scores
from tropd_mcore.train.run_dir import RunDir
from tropd_mcore.types import Rollout, TeacherScores


class Teacher(Protocol):
    """Scores packs; collective over all ranks."""

    def score(self, rollouts: list[Rollout], packed: PackedStep) -> list[TeacherScores | None]:
        """The scores of each micro-batch in order; None on all but the last stage."""
        ...


class ScoreSource:
    """Teacher scores by step, kept on disk until no resume can need them."""

    def __init__(self, teacher: Teacher, run_dir: RunDir, replay: Path | None, layout: Layout) -> None:
        self._teacher = teacher
        self._run_dir = run_dir
        self._replay = RunDir(replay) if replay is not None else None
        self._layout = layout

    def at_step(self, step: int, rollouts: list[Rollout], packed: PackedStep) -> list[TeacherScores | None]:
        """The scores of this rank's micro-batches; None on all but the last stage. Collective."""
        layout = self._layout
        control = layout.groups.control
        stored: list[TeacherScores] | None = None
        with shared_fate(control):
            if layout.is_last_stage:
                stored = self._stored(step, packed)
        if all_agree(stored is not None or not layout.is_last_stage, control):
            return list(stored) if stored is not None else [None] * len(packed.micro_batches)

        scores = self._teacher.score(rollouts, packed)
        with shared_fate(control):
            present = [score for score in scores if score is not None]
            if layout.is_last_stage and layout.tp_rank == 0:
                save_scores(self._path(self._run_dir, step), packed.micro_batches, present)
        return scores

    def _stored(self, step: int, packed: PackedStep) -> list[TeacherScores] | None:
        for run_dir in (self._run_dir, self._replay):
            if run_dir is not None:
                scores = load_scores(self._path(run_dir, step), packed.micro_batches)
                if scores is not None:
                    return scores
        return None

    def _path(self, run_dir: RunDir, step: int) -> Path:
        return run_dir.scores(step, self._layout.dp_rank, self._layout.cp_rank)
