"""The student as its own teacher: an average of its weights that reads a correct solution before the response.

`teacher.solutions` chooses what it reads, and `mcore.average` keeps the average. Invariants: each replica scores its
own samples, so no row leaves it. The scored tokens are the student's rows, but their context differs, so the teacher
has its own packs. Scores never leave the device. A sample without a solution has `scored_T` False on all of its rows.

Shapes: S samples of the step, R rows of this rank in the student's packs, of which N have a teacher, Q rows in the
teacher's packs, T rows of one micro-batch, K teacher top-k, L student top-k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tropd_mcore.data.packing import PackedStep, pack, pack_multiple
from tropd_mcore.data.supervision import IgnoredTokens
from tropd_mcore.mcore.collective import on_rank_zero, union
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.row_exchange import RowExchange, row_keys, row_samples
from tropd_mcore.mcore.scoring import score_micro_batches
from tropd_mcore.sentinels import ABSENT, NO_ENTRY
from tropd_mcore.teacher.solutions import SolutionPrompts
from tropd_mcore.types import IntArray, Rollout, TeacherScores

_BLANKS = {
    "logp_T": 0.0,
    "topk_ids_TK": NO_ENTRY,
    "topk_logp_TK": ABSENT,
    "tail_mass_T": 1.0,
    "entropy_T": 0.0,
    "scored_T": False,
    "logp_of_student_topk_TL": ABSENT,
}
"""The scores of a row without a teacher."""


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
        self._tokens_per_micro_batch = tokens_per_micro_batch
        self._ignored = ignored
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
        return lesson.scores(scores)

    def _teacher_packs(
        self, rollouts: list[Rollout], contexts: list[IntArray | None], packed: PackedStep
    ) -> _TeacherPacks:
        """Pack this replica's samples that have a teacher; if none has, the pack is empty."""
        rollouts_with_solution: dict[int, Rollout] = {}
        for sample in sorted(union(packed.samples, self._model.layout.groups.cp)):
            context = contexts[sample]
            if context is not None:
                rollouts_with_solution[sample] = dataclasses.replace(rollouts[sample], prompt_ids=context)
        theirs = self._pack(list(rollouts_with_solution.values()))

        # The key of a token: its position when prefixes and responses of rollouts_with_solution are concatenated.
        lengths = [len(rollout.prefix_ids) + len(rollout.response_ids) for rollout in rollouts_with_solution.values()]
        starts = np.cumsum([0, *lengths])
        first_S = np.zeros(len(rollouts), dtype=np.int64)
        first_informed = np.zeros(len(rollouts_with_solution), dtype=np.int64)
        for index, (sample, rollout) in enumerate(rollouts_with_solution.items()):
            first_S[sample] = starts[index] - len(rollouts[sample].prompt_ids)
            first_informed[index] = starts[index] - len(rollout.prompt_ids)
        has_teacher_S = np.isin(np.arange(len(rollouts)), list(rollouts_with_solution))

        has_teacher_R = self._tensor(has_teacher_S)[row_samples(packed.micro_batches)]
        exchange = RowExchange(
            row_keys(packed.micro_batches, self._tensor(first_S))[has_teacher_R],
            row_keys(theirs.micro_batches, self._tensor(first_informed)),
            int(starts[-1]),
            self._model.layout.groups.cp,
        )
        return _TeacherPacks(theirs, has_teacher_R, exchange, [len(batch.rows_T) for batch in packed.micro_batches])

    def _pack(self, rollouts_with_solution: list[Rollout]) -> PackedStep:
        """Packs of this replica only: a forward pass of a frozen model never waits for another replica."""
        layout = self._model.layout
        return pack(
            rollouts_with_solution,
            tokens_per_micro_batch=self._tokens_per_micro_batch,
            dp_size=1,
            dp_rank=0,
            cp_size=layout.cp_size,
            cp_rank=layout.cp_rank,
            tp_size=layout.tp_size,
            aggregation="token_mean",
            prefix_denominator="joint",
            device=self._model.platform.device,
            ignored=self._ignored,
        )

    def _tensor(self, values: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self._model.platform.device)


@dataclass(frozen=True)
class _TeacherPacks:
    """The teacher's packs, and the exchange between the student's rows and the teacher's rows."""

    packed: PackedStep
    has_teacher_R: Tensor
    """bool [R], whether a row of the student's packs is one of the N that have a teacher"""
    exchange: RowExchange
    """from those N to the Q rows of the teacher's packs"""
    rows: list[int]
    """T of each of the student's micro-batches"""

    def own_candidates(self, own_ids: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The student's top-k candidates for each of the teacher's micro-batches; None if none are requested."""
        present = [ids_TL for ids_TL in own_ids if ids_TL is not None]
        if not present:
            return None
        assert len(present) == len(own_ids), "the candidates of some micro-batches are missing"
        sizes = [len(micro_batch.rows_T) for micro_batch in self.packed.micro_batches]
        return list(self.exchange.send(torch.cat(present)[self.has_teacher_R]).split(sizes))

    def scores(self, theirs: Sequence[TeacherScores | None]) -> list[TeacherScores | None]:
        """The scores for each of the student's micro-batches."""
        pieces = [vars(score) for score in theirs if score is not None]
        back = self.exchange.reversed()
        columns: dict[str, Sequence[Tensor]] = {}
        for name, blank in _BLANKS.items():
            column = [piece[name] for piece in pieces]
            if column[0] is None:
                continue
            values_NX = back.send(torch.cat(column))
            all_RX = values_NX.new_full((len(self.has_teacher_R), *values_NX.shape[1:]), blank)
            all_RX[self.has_teacher_R] = values_NX
            columns[name] = all_RX.split(self.rows)
        rows = range(len(self.rows))
        return [TeacherScores(**{name: column[index] for name, column in columns.items()}) for index in rows]
