"""The teacher as a frozen Megatron model in the training job, sharded over the same ranks as the student.

Not for loading weights (`mcore.weights_io`). Invariant: scores are of the teacher's full vocabulary in float32, on the
last pipeline stage, aligned with the rows of the micro-batches; no number leaves the device.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tropd_mcore.data.packing import PackedStep
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.scoring import score_micro_batches
from tropd_mcore.types import Rollout, TeacherScores


class MegatronTeacher:
    """Scores packs with one forward pass of `model`, at temperature 1.

    `k` is the size of the support; `keep_hidden` adds the hidden states, for a divergence over the whole vocabulary.
    """

    def __init__(self, model: Model, *, k: int, settings: LossSettings, keep_hidden: bool = False) -> None:
        assert not model.trainable, "a teacher is frozen"
        self._model = model
        self._k = k
        self._settings = settings
        self._keep_hidden = keep_hidden

    def score(
        self,
        rollouts: list[Rollout],
        packed: PackedStep,
        own_ids: Sequence[Tensor | None],
        verdicts: Sequence[bool | None],
    ) -> list[TeacherScores | None]:
        """Return the scores of each micro-batch in order; None on all but the last stage. Collective.

        `rollouts` and `verdicts` are not looked at: the packs hold the tokens. `own_ids[i]`, int64 [T, L]: further ids
        of micro-batch i whose log q is wanted.
        """
        return score_micro_batches(
            self._model,
            packed.micro_batches,
            packed.pack_length,
            k=self._k,
            settings=self._settings,
            extra_ids=own_ids,
            keep_hidden=self._keep_hidden,
        )
