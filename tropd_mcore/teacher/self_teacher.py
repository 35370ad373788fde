"""The student as its own teacher: an average of its weights that reads a correct solution before the response.

`teacher.solutions` chooses what it reads, and `mcore.average` keeps the average. Invariants: each replica scores its
own samples, so no row leaves it. The scored tokens are the student's rows, but their context differs, so the teacher
has its own packs. Scores never leave the device. A sample without a solution has `scored_T` False on all of its rows.

Shapes: T rows of one micro-batch, L student top-k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from tropd_mcore.data.packing import PackedStep, pack_multiple
from tropd_mcore.data.supervision import IgnoredTokens
from tropd_mcore.mcore.collective import on_rank_zero
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.scoring import score_micro_batches
from tropd_mcore.teacher.own_packs import Packing, TeacherPacks, by_micro_batch
from tropd_mcore.teacher.solutions import SolutionPrompts
from tropd_mcore.types import IntArray, Rollout, TeacherScores


class SelfTeacher:
    """Scores rollouts with `model` at temperature 1, with `prompts` in place of their own prompts.

    `k` is the number of top-k candidates. A sample has no teacher if no solution leaves room for its response in a pack
    of `tokens_per_micro_batch` and in the model's context. `ignored` are the tokens that the student does not train on.
    """

    def __init__(
        self,
        model: Model,
        prompts: SolutionPrompts,
        *,
        k: int,
        settings: LossSettings,
        tokens_per_micro_batch: int,
        ignored: IgnoredTokens,
    ) -> None:
        assert not model.trainable, "a teacher is frozen"
        self._model = model
        self._prompts = prompts
        self._k = k
        self._settings = settings
        self._packing = Packing(model.layout, model.platform.device, tokens_per_micro_batch, ignored)
        multiple = pack_multiple(model.layout.cp_size, model.layout.tp_size)
        whole_pack = tokens_per_micro_batch // multiple * multiple
        self._longest = min(whole_pack, model.arch.max_position_embeddings)

    def score(
        self,
        rollouts: list[Rollout],
        packed: PackedStep,
        own_ids: Sequence[Tensor | None],
        verdicts: Sequence[bool | None],
    ) -> list[TeacherScores | None]:
        """Return the scores of each micro-batch in order; None on all but the last stage. Collective.

        `own_ids[i]`, int64 [T, L]: the student's top-k candidates of micro-batch i, whose log q is added. `verdicts`
        (used on rank 0) say which rollouts are correct. With context parallelism, each column needs one sum over the
        context group.
        """
        layout = self._model.layout
        contexts: list[IntArray | None] = on_rank_zero(
            lambda: self._prompts.contexts(rollouts, verdicts, longest=self._longest), layout.groups.control
        )
        lesson = self._teacher_packs(rollouts, contexts, packed)
        extra_ids = lesson.own_candidates(own_ids) if layout.is_last_stage else None
        scores = score_micro_batches(
            self._model,
            lesson.packed.micro_batches,
            lesson.packed.pack_length,
            k=self._k,
            settings=self._settings,
            extra_ids=extra_ids,
        )
        if not layout.is_last_stage:
            return [None] * len(packed.micro_batches)
        columns_R: dict[str, Tensor] = {}
        lesson.put(scores, columns_R)
        return by_micro_batch(columns_R, lesson.rows)

    def _teacher_packs(
        self, rollouts: list[Rollout], contexts: list[IntArray | None], packed: PackedStep
    ) -> TeacherPacks:
        """Pack this replica's samples that have a teacher; if none has, the pack is empty."""
        read: dict[int, Rollout] = {}
        for sample in self._packing.samples(packed):
            context = contexts[sample]
            if context is not None:
                read[sample] = dataclasses.replace(rollouts[sample], prompt_ids=context)
        return TeacherPacks.of(read, rollouts, packed, self._packing)
