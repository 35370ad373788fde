"""Collective access to the SGLang teacher: a few ranks fetch scores and the others receive them.

This module does no HTTP (see `teacher.sglang`). If rank 0 started the server, only rank 0 asks it and can also restart
it. A server that runs elsewhere is asked by one rank of each replica, for that replica's rollouts. Invariants: the
ranks of a replica's last stage get the same arrays. A failed fetch raises on all ranks of the job. A sample is scored
once per step, and a second time only if it takes over the prefix loss of a sample that could not be scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from tropd_mcore.data.packing import PackedStep
from tropd_mcore.data.verdicts import Verdict
from tropd_mcore.errors import TeacherError
from tropd_mcore.mcore.collective import on_rank_zero, raise_on_all_ranks, union
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.teacher.identity_check import TeacherCheck
from tropd_mcore.teacher.sglang import SampleScore, SampleScores, SglangTeacher, first_scored, to_micro_batch
from tropd_mcore.types import Rollout, TeacherScores


class ServedTeacher:
    """Scores through `teacher`, which is None on ranks that do not fetch. `topk` is the width of its answers.

    If more than the fraction `masked_share` of a step's samples, or all of them, could not be scored, the run stops
    with a message that names `key`. With several teachers, these are the samples of this one. `check` verifies that the
    server stays the same teacher (gates.teacher_identity); None turns this off.
    """

    def __init__(
        self,
        teacher: SglangTeacher | None,
        layout: Layout,
        *,
        topk: int,
        only_rank_zero: bool,
        masked_share: float,
        check: TeacherCheck | None = None,
        key: str = "teacher.server",
    ) -> None:
        self.check = check
        self._key = key
        self._teacher = teacher
        self._layout = layout
        self._topk = topk
        self._only_rank_zero = only_rank_zero
        self._masked_share = masked_share
        self._answers: dict[str, SampleScore] = {}
        """Sample id -> scores of the current step, until `score` returns them."""
        self._failed: set[str] = set()
        """Ids of the current step's samples with a failed request: the first one, or the one for the prefix."""

    def score(
        self,
        rollouts: list[Rollout],
        packed: PackedStep,
        own_ids: Sequence[Tensor | None],
        verdicts: Sequence[Verdict],
    ) -> list[TeacherScores | None]:
        """Return the scores of each micro-batch in order; None on all but the last stage. Collective."""
        assert all(ids is None for ids in own_ids), "a served teacher scores its own candidates only"
        self._ask(rollouts, packed)
        self._check_masked(len(rollouts))
        scores = SampleScores([self._answers.get(rollout.sample_id) for rollout in rollouts], self._topk)
        self._answers, self._failed = {}, set()
        if not self._layout.is_last_stage:
            return [None] * len(packed.micro_batches)
        return [to_micro_batch(scores, micro_batch) for micro_batch in packed.micro_batches]

    def lost(self, rollouts: list[Rollout], packed: PackedStep) -> set[int]:
        """Return the indices of rollouts that could not be scored, or whose prefix could not. Collective.

        Sends the requests that `score` would send, and keeps the answers for it. Call it again after other samples have
        become carriers of a prefix.
        """
        self._ask(rollouts, packed)
        failed = self._failed_everywhere()
        return {index for index, rollout in enumerate(rollouts) if rollout.sample_id in failed}

    def _failed_everywhere(self) -> set[str]:
        """The step's samples with a failed request on any rank. Collective."""
        failed = [self._failed]
        if not self._only_rank_zero:
            failed *= self._layout.world_size
            dist.all_gather_object(failed, self._failed, group=self._layout.groups.control)
        return set().union(*failed)

    def _check_masked(self, asked: int) -> None:
        """Raise TeacherError on every rank if more than `masked_share` of the step, or all of it, has no scores."""
        failed = self._failed_everywhere()
        if len(failed) > self._masked_share * asked or len(failed) == asked > 0:
            raise TeacherError(
                f"{self._key}: {len(failed)} of {asked} samples of the step could not be scored, among them "
                f"{min(failed)}; at most gates.masked_share={self._masked_share:g} of a step may be left out (the "
                "reasons are in the warnings above)"
            )

    def _ask(self, rollouts: list[Rollout], packed: PackedStep) -> None:
        """Fetch the scores that this replica's packs need and that were not fetched yet. Collective."""
        layout = self._layout
        if self._only_rank_zero:
            missing = self._missing(rollouts, range(len(rollouts)))
            fetched = on_rank_zero(lambda: self._fetch(rollouts, missing), layout.groups.control)
        else:
            missing = self._missing(rollouts, self._samples_of_replica(packed))
            fetched = self._fetch_by_replica(rollouts, missing)
        for index, sample in zip(missing, fetched, strict=True):
            if sample is None:
                self._failed.add(rollouts[index].sample_id)
            else:
                self._answers[rollouts[index].sample_id] = sample

    def _missing(self, rollouts: list[Rollout], wanted: Sequence[int]) -> list[int]:
        """The wanted rollouts that were not requested yet, or only from a later token than is needed now."""

        def is_known(rollout: Rollout) -> bool:
            answer = self._answers.get(rollout.sample_id)
            return rollout.sample_id in self._failed or (answer is not None and answer.first <= first_scored(rollout))

        return [index for index in wanted if not is_known(rollouts[index])]

    def _fetch_by_replica(self, rollouts: list[Rollout], samples: list[int]) -> list[SampleScore | None]:
        """Result of `_fetch` on every rank of the replica's last stage; `samples` is empty on the other stages."""
        layout = self._layout
        box: list[list[SampleScore | None]] = [[]]
        with raise_on_all_ranks(layout.groups.control):
            if layout.tp_rank == 0 and layout.cp_rank == 0:
                box[0] = self._fetch(rollouts, samples)
        if samples and layout.tp_rank == 0:
            dist.broadcast_object_list(box, group=layout.groups.cp, group_src=0)
        if samples:
            dist.broadcast_object_list(box, group=layout.groups.tp, group_src=0)
        return box[0]

    def _fetch(self, rollouts: list[Rollout], samples: list[int]) -> list[SampleScore | None]:
        """Scores of the rollouts with the indices `samples`, in order; None for one that could not be scored."""
        if not samples:
            return []
        assert self._teacher is not None
        # each replica asks for its own few samples, so only all replicas together show whether the teacher is lost
        may_have_scores = bool(self._answers) or not self._only_rank_zero
        return self._teacher.fetch([rollouts[index] for index in samples], may_have_scores=may_have_scores).samples

    def _samples_of_replica(self, packed: PackedStep) -> list[int]:
        """Indices of rollouts with rows in this replica's packs, on any of its context ranks; [] on other stages."""
        return sorted(union(packed.samples, self._layout.groups.cp)) if self._layout.is_last_stage else []
