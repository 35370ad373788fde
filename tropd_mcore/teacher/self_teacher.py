"""The student as its own teacher: the average of its weights, reading a correct solution before the response.

Not for what it reads (`data.feedback`) or for the average (`mcore.average`). Invariants: a replica scores its own
samples, so that no row leaves it; the tokens that are scored are the student's rows, in another context and therefore
in other packs; no number leaves the device; a sample without a solution has `scored_T` False on all of its rows.

Shapes: S samples of the step, R rows of this rank in the student's packs, of which N have a teacher, Q rows in the
teacher's packs, T rows of one micro-batch, K teacher top-k, L student top-k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.data.feedback import SolutionPrompts
from tropd_mcore.data.packing import PackedStep, pack
from tropd_mcore.data.supervision import IgnoredTokens
from tropd_mcore.losses.kernel.shard import NO_ENTRY
from tropd_mcore.losses.objectives.inputs import ABSENT
from tropd_mcore.mcore.collective import on_rank_zero
from tropd_mcore.mcore.dry_run import pack_multiple
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.scoring import score_micro_batches
from tropd_mcore.types import IntArray, MicroBatch, Rollout, TeacherScores

_BLANKS = {
    "logp_T": 0.0,
    "topk_ids_TK": NO_ENTRY,
    "topk_logp_TK": ABSENT,
    "tail_mass_T": 1.0,
    "entropy_T": 0.0,
    "scored_T": 0,
    "own_logp_TL": ABSENT,
}
"""The scores of a row without a teacher."""


class SelfTeacher:
    """Scores rollouts with `model` at temperature 1, after `prompts` instead of their own; `k` as for other teachers.

    A sample has no teacher where no solution leaves room for its response in a pack of `tokens_per_micro_batch` and in
    the model's context. `ignored` are the tokens that are no rows for the student either.
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
        whole_pack = tokens_per_micro_batch // pack_multiple(model.layout) * pack_multiple(model.layout)
        self._longest = min(whole_pack, model.arch.max_position_embeddings)

    def score(
        self,
        rollouts: list[Rollout],
        packed: PackedStep,
        own_ids: Sequence[Tensor | None],
        verdicts: Sequence[bool | None],
    ) -> list[TeacherScores | None]:
        """Return the scores of each micro-batch in order; None on all but the last stage. Collective.

        `own_ids[i]`, int64 [T, L]: the student's candidates of micro-batch i whose log q is wanted. `verdicts`, on rank
        0: which of the rollouts are correct. Runs, where context parallel, one sum over the context group a column.
        """
        layout = self._model.layout
        contexts: list[IntArray | None] = on_rank_zero(
            lambda: self._prompts.contexts(rollouts, verdicts, longest=self._longest), layout.groups.control
        )
        taught = [sample for sample in self._samples_of_replica(packed) if contexts[sample] is not None]
        informed = [dataclasses.replace(rollouts[sample], prompt_ids=contexts[sample]) for sample in taught]
        theirs = self._pack(informed)
        if not layout.is_last_stage:
            self._forward(theirs, [None] * len(theirs.micro_batches))
            return [None] * len(packed.micro_batches)
        routes = _Routes.between(packed.micro_batches, rollouts, taught, theirs.micro_batches, informed, layout.groups.cp)
        scores = self._forward(theirs, routes.there(own_ids))
        return routes.back(scores)
