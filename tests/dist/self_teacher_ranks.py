"""Code that the ranks of the self-teacher tests run: the same rows scored in their own and in other contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tests.dist.layouts import Case, layout_of
from tropd_mcore.data.packing import PackedStep
from tropd_mcore.data.supervision import IgnoredTokens
from tropd_mcore.mcore.model import Model, build_model
from tropd_mcore.mcore.packs import pack_on
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.weights_io import load_hf
from tropd_mcore.teacher.megatron import MegatronTeacher
from tropd_mcore.teacher.self_teacher import SelfTeacher
from tropd_mcore.types import MicroBatch, Rollout, TeacherScores
from tropd_mcore.weights.architecture import read_architecture

K, OWN, IGNORED = 7, 5, 3
Context = np.ndarray | None


@dataclass(frozen=True)
class GivenPrompts:
    """Stands in for rendered prompts with solutions. Used only on rank 0, which has the verdicts."""

    given: Sequence[Context]

    def contexts(self, rollouts: Sequence[Rollout], verdicts: Sequence[Any], *, longest: int) -> list[Context]:
        assert dist.get_rank() == 0 and len(verdicts) == len(rollouts) == len(self.given)
        assert longest >= max(len(rollout.token_ids) for rollout in rollouts)
        return list(self.given)


def candidates(sample: Tensor, token: Tensor, vocabulary: int) -> Tensor:
    """OWN different ids determined by the row, [T, OWN]."""
    return (sample[:, None] * 31 + token[:, None] * 17 + torch.arange(OWN) * 13) % vocabulary


def scored(
    folder: Path, rollouts: list[Rollout], contexts: list[Context], cases: dict[str, Case], vocabulary: int
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """{case: {teacher: columns}}: the rows of this rank by a teacher with the prompts and by one with `contexts`."""
    found = {}
    for name, case in cases.items():
        with layout_of(case) as (layout, platform):
            model = build_model(
                read_architecture(folder), case.parallel, layout, platform,
                dtype="float32", trainable=False, cut_like_student=True,
            )  # fmt: skip
            load_hf(model, folder, layout)
            found[name] = _score(model, rollouts, contexts, case, vocabulary)
    return found


def _score(
    model: Model, rollouts: list[Rollout], contexts: list[Context], case: Case, vocabulary: int
) -> dict[str, dict[str, Tensor]]:
    layout, settings = model.layout, case.settings(0.8)
    ignored = IgnoredTokens(always=frozenset({IGNORED}))
    packed = _pack(rollouts, case, layout, ignored)
    own_ids = [
        candidates(batch.sample_index_T, batch.token_index_T, vocabulary) if layout.is_last_stage else None
        for batch in packed.micro_batches
    ]
    verdicts = [True] * len(rollouts) if layout.rank == 0 else []
    itself = SelfTeacher(
        model,
        GivenPrompts(contexts),
        k=K,
        settings=settings,
        tokens_per_micro_batch=case.tokens_per_micro_batch,
        ignored=ignored,
    )
    plain = MegatronTeacher(model, k=K, settings=settings)
    scores = {
        "self": itself.score(rollouts, packed, own_ids, verdicts),
        "plain": plain.score(rollouts, packed, own_ids, verdicts),
    }
    if not layout.is_last_stage:
        assert scores["self"] == [None] * len(packed.micro_batches)
        return {}
    return {name: _columns(packed.micro_batches, score) for name, score in scores.items()}


def _pack(rollouts: list[Rollout], case: Case, layout: Layout, ignored: IgnoredTokens) -> PackedStep:
    """The student's packs, without the multiple of an interleaved schedule: a self-teacher's own packs have none."""
    plain = replace(layout, vpp_size=1)
    return pack_on(plain, rollouts, tokens_per_micro_batch=case.tokens_per_micro_batch, device="cpu", ignored=ignored)


def _columns(micro_batches: list[MicroBatch], scores: Sequence[TeacherScores | None]) -> dict[str, Tensor]:
    """The scores of this rank's rows, with the row's sample and token."""
    pieces = []
    for batch, score in zip(micro_batches, scores, strict=True):
        assert score is not None and len(score.logp_T) == len(batch.rows_T)
        numbers = {name: value for name, value in vars(score).items() if name != "hidden_TD" and value is not None}
        pieces.append({"sample": batch.sample_index_T, "token": batch.token_index_T, **numbers})
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
