"""Code that the ranks of the offload tests run. Not a test module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.dist.layouts import Case, Constants, build, layout_of, pack_for, train_step, whole_gradients
from tropd_mcore.mcore.model import Model, offloaded, resident
from tropd_mcore.mcore.scoring import score_micro_batches
from tropd_mcore.types import Rollout, TeacherScores

CONSTANTS = Constants(k=8, temperature=0.8, beta=0.05, outlier_weight=0.7)


def compare(
    folder: Path, rollouts: list[Rollout], cases: dict[str, Case]
) -> dict[str, tuple[bool, int, list[int], int]]:
    """{case: (equal scores, bytes of weights at first, between the scorings, inside a block)}."""
    found = {}
    for name, case in cases.items():
        with layout_of(case) as (layout, platform):
            model = build(folder, case, layout, platform, trainable=False)
            packed = pack_for(rollouts, case, layout)

            def score(model: Model, packed: Any = packed, case: Case = case) -> list[TeacherScores | None]:
                batches, length = packed.micro_batches, packed.pack_length
                return score_micro_batches(model, batches, length, k=8, settings=case.settings(1.0))

            expected, before = score(model), device_bytes(model)
            moved = offloaded(model)
            between, same = [device_bytes(moved)], True
            for _ in range(2):
                same = same and _equal(score(moved), expected)
                between.append(device_bytes(moved))
            with resident(moved):
                inside = device_bytes(moved)
            found[name] = (same, before, between, inside)
    return found


def gradients(student: Path, teacher: Path, rollouts: list[Rollout]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The student's gradients with a teacher that stays, and with one that is offloaded."""
    found = []
    for offload in (False, True):
        case = Case()
        with layout_of(case) as (layout, platform):
            trained = build(student, case, layout, platform, trainable=True)
            frozen = build(teacher, case, layout, platform, trainable=False)
            train_step(trained, offloaded(frozen) if offload else frozen, rollouts, case, CONSTANTS)
            found.append(whole_gradients(trained, layout))
    return found[0], found[1]


def device_bytes(model: Model) -> int:
    return sum(parameter.nbytes for module in model.modules for parameter in module.parameters())


def _equal(found: list[TeacherScores | None], expected: list[TeacherScores | None]) -> bool:
    pairs = list(zip(found, expected, strict=True))
    if any((one is None) != (other is None) for one, other in pairs):
        return False
    both = [(one, other) for one, other in pairs if one is not None and other is not None]
    return all(
        torch.equal(one.logp_T, other.logp_T) and torch.equal(one.topk_logp_TK, other.topk_logp_TK)
        for one, other in both
    )
