"""Code that the ranks run to score with excluded tokens. Not a test module."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.dist.layouts import Case, build, layout_of, pack_for
from tropd_mcore.errors import TeacherError
from tropd_mcore.mcore.scoring import score_micro_batches
from tropd_mcore.teacher.megatron import MegatronTeacher
from tropd_mcore.types import Rollout, TeacherScores


def score_both(
    folder: Path, rollouts: list[Rollout], case: Case, k: int, excluded: list[int], own: list[int]
) -> list[tuple[TeacherScores, TeacherScores, str]]:
    """(all V candidates, K candidates of a teacher without `excluded`, its error for too many) of each micro-batch."""
    with layout_of(case) as (layout, platform):
        model = build(folder, case, layout, platform, trainable=False)
        packed, settings = pack_for(rollouts, case, layout), case.settings(temperature=1.0)
        batches, length = packed.micro_batches, packed.pack_length
        vocab_size = model.arch.vocab_size
        own_ids = [torch.tensor(own, dtype=torch.int64).expand(len(batch.rows_T), -1) for batch in batches]
        whole = score_micro_batches(model, batches, length, k=vocab_size, settings=settings, extra_ids=own_ids)
        teacher = MegatronTeacher(model, k=k, settings=settings, excluded=excluded)
        found = teacher.score([], packed, own_ids, [])
        try:
            MegatronTeacher(model, k=vocab_size - len(excluded), settings=settings, excluded=excluded)
            MegatronTeacher(model, k=vocab_size - len(excluded) + 1, settings=settings, excluded=excluded)
            error = ""
        except TeacherError as met:
            error = str(met)
        return [(a, b, error) for a, b in zip(whole, found, strict=True) if a is not None and b is not None]
