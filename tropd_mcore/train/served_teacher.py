"""The SGLang teacher as all ranks of the job see it: few ranks fetch, the others receive.

Not for HTTP (`teacher.sglang`). A server that rank 0 started is asked by rank 0 alone, which can also restart it; one
that runs elsewhere is asked by one rank of each replica, for that replica's rollouts. Invariant: the ranks of a
replica's last stage get the same arrays; a failed fetch is met by all ranks of the job.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from tropd_mcore.data.packing import PackedStep
from tropd_mcore.mcore.collective import on_rank_zero, shared_fate
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.teacher.sglang import SampleScores, SglangTeacher, to_micro_batch
from tropd_mcore.train.verdicts import Verdict
from tropd_mcore.types import Rollout, TeacherScores


class ServedTeacher:
    """Scores through `teacher`, which is None on the ranks that do not fetch; `topk` is the width of its answers."""

    def __init__(self, teacher: SglangTeacher | None, layout: Layout, *, topk: int, only_rank_zero: bool) -> None:
        self._teacher = teacher
        self._layout = layout
        self._topk = topk
        self._only_rank_zero = only_rank_zero

    def score(
        self,
        rollouts: list[Rollout],
        packed: PackedStep,
        own_ids: Sequence[Tensor | None],
        verdicts: Sequence[Verdict],
    ) -> list[TeacherScores | None]:
        """The scores of each micro-batch in order; None on all but the last stage. Collective."""
        assert all(ids is None for ids in own_ids), "a served teacher scores its own candidates only"
        layout = self._layout
        if self._only_rank_zero:
            everyone = range(len(rollouts))
            scores = on_rank_zero(lambda: self._fetch(rollouts, list(everyone)), layout.groups.control)
        else:
            scores = self._fetch_by_replica(rollouts, self._samples_of_replica(packed))
        if not layout.is_last_stage:
            return [None] * len(packed.micro_batches)
        return [to_micro_batch(scores, micro_batch) for micro_batch in packed.micro_batches]

    def _fetch_by_replica(self, rollouts: list[Rollout], samples: list[int]) -> SampleScores:
        layout = self._layout
        box: list[SampleScores | None] = [None]
        with shared_fate(layout.groups.control):
            if samples and layout.tp_rank == 0 and layout.cp_rank == 0:
                box[0] = self._fetch(rollouts, samples)
        if samples and layout.tp_rank == 0:
            dist.broadcast_object_list(box, group=layout.groups.cp, group_src=0)
        if samples:
            dist.broadcast_object_list(box, group=layout.groups.tp, group_src=0)
        return box[0] or SampleScores([None] * len(rollouts), self._topk)

    def _fetch(self, rollouts: list[Rollout], samples: list[int]) -> SampleScores:
        """Scores of the named rollouts, in a list that has a place for all."""
        assert self._teacher is not None
        fetched = self._teacher.fetch([rollouts[index] for index in samples])
        by_index = dict(zip(samples, fetched.samples, strict=True))
        return dataclasses.replace(fetched, samples=[by_index.get(index) for index in range(len(rollouts))])

    def _samples_of_replica(self, packed: PackedStep) -> list[int]:
        """Rollouts that have rows in this replica's packs, on any of its context ranks; [] on the other stages."""
        if not self._layout.is_last_stage:
            return []
        mine = {int(index) for micro_batch in packed.micro_batches for index in micro_batch.sample_index}
        parts: list[set[int]] = [set()] * self._layout.cp_size
        dist.all_gather_object(parts, mine, group=self._layout.groups.cp)
        return sorted(set().union(*parts))
