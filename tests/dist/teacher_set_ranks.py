"""Code that the ranks of the tests of several teachers run: every teacher scores the samples that name it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tests.dist.layouts import Case, build, layout_of
from tests.dist.self_teacher_ranks import IGNORED, K, _columns, candidates
from tropd_mcore.data.supervision import IgnoredTokens
from tropd_mcore.mcore.packs import pack_on
from tropd_mcore.teacher.megatron import MegatronTeacher
from tropd_mcore.teacher.own_packs import Packing
from tropd_mcore.teacher.score_source import Teacher
from tropd_mcore.teacher.teacher_set import TeacherSet
from tropd_mcore.types import Rollout


def scored(
    folders: Mapping[str, Path], rollouts: list[Rollout], cases: dict[str, Case], vocabulary: int
) -> dict[str, dict[str, Tensor]]:
    """{case: columns of this rank's rows}, scored by the teachers in `folders`; {} on all but the last stage."""
    found = {}
    for name, case in cases.items():
        with layout_of(case) as (layout, platform):
            settings, ignored = case.settings(0.8), IgnoredTokens(always=frozenset({IGNORED}))
            teachers: dict[str, Teacher] = {
                teacher: MegatronTeacher(build(folder, case, layout, platform, trainable=False), k=K, settings=settings)
                for teacher, folder in folders.items()
            }
            packing = Packing(layout, torch.device("cpu"), case.tokens_per_micro_batch, ignored)
            packed = pack_on(
                layout,
                rollouts,
                tokens_per_micro_batch=case.tokens_per_micro_batch,
                device="cpu",
                ignored=ignored,
            )
            own_ids = [
                candidates(batch.sample_index_T, batch.token_index_T, vocabulary) if layout.is_last_stage else None
                for batch in packed.micro_batches
            ]
            scores = TeacherSet(teachers, packing).score(rollouts, packed, own_ids, [])
            assert len(scores) == len(packed.micro_batches)
            assert layout.is_last_stage or scores == [None] * len(scores)
            found[name] = _columns(packed.micro_batches, scores) if layout.is_last_stage else {}
    return found
