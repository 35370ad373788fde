"""Code that the ranks of the held-out tests run: a student, a teacher, and the measure of a few responses.

This is not a test module. The rank processes import it, so it does not import transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.dist.layouts import Case, build, layout_of, pack_for
from tropd_mcore.config.schema import HeldOutConfig
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.weights_io import named_parameters
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.teacher.megatron import MegatronTeacher
from tropd_mcore.teacher.score_source import ScoreSource, Teacher
from tropd_mcore.train.held_out import HeldOut, LoadedOnce
from tropd_mcore.types import HeldOutDistance, Rollout

EVERY, LAST_STEP = 3, 7


@dataclass(frozen=True)
class Measured:
    """What rank 0 found in one layout; on the other ranks all distances are None."""

    by_step: dict[int, HeldOutDistance | None]
    again: HeldOutDistance | None
    """From the stored scores, by a teacher that must not be asked"""
    without_teacher: HeldOutDistance | None
    loads: int
    """How often the teacher was loaded"""
    untouched: bool
    """Whether random states and gradients are as they were before"""


class Unasked:
    """A teacher whose scores must be on disk."""

    def score(self, *_: Any) -> Any:
        raise AssertionError("the teacher is asked a second time")


def measure_cases(
    student_folder: Path,
    teacher_folder: Path,
    rollouts: list[Rollout],
    cases: dict[str, Case],
    k: int,
    temperature: float,
    runs: Path,
) -> dict[str, Measured]:
    """On the ranks: the measurements of each case."""
    return {
        name: _measure(student_folder, teacher_folder, rollouts, case, k, temperature, runs / name)
        for name, case in cases.items()
    }


def _measure(
    student_folder: Path,
    teacher_folder: Path,
    rollouts: list[Rollout],
    case: Case,
    k: int,
    temperature: float,
    run: Path,
) -> Measured:
    loads: list[int] = []
    with layout_of(case) as (layout, platform):
        student = build(student_folder, case, layout, platform, trainable=True)
        settings = case.settings(temperature)

        def load() -> MegatronTeacher:
            loads.append(1)
            model = build(teacher_folder, case, layout, platform, trainable=False)
            return MegatronTeacher(model, k=k, settings=settings)

        def held_out(teacher: Teacher | None) -> HeldOut:
            packed = pack_for(rollouts, case, layout)
            config = HeldOutConfig(prompts=Path("p"), responses=Path("r"), every=EVERY, topk=k)
            scores = None if teacher is None else _scores(teacher, run, layout)
            return HeldOut(config, LAST_STEP, student, settings, rollouts, packed, scores)

        for parameter in named_parameters(student).values():
            parameter.main_grad.fill_(2.0)  # type: ignore[attr-defined]
        before = torch.get_rng_state()
        first = held_out(LoadedOnce(load))
        found = {step: first.at_step(step) for step in range(LAST_STEP + 1)}
        untouched = torch.equal(before, torch.get_rng_state()) and all(
            bool((parameter.main_grad == 2.0).all())  # type: ignore[attr-defined]
            for parameter in named_parameters(student).values()
        )
        return Measured(found, held_out(Unasked()).at_step(0), held_out(None).at_step(0), len(loads), untouched)


def _scores(teacher: Teacher, run: Path, layout: Layout) -> ScoreSource:
    place: Callable[..., Path] = lambda run_dir, step, dp, cp: run_dir.held_out_scores(dp, cp)  # noqa: E731
    return ScoreSource(teacher, RunDir(run), layout, replay=None, name="teacher", on_disk=True, place=place)
