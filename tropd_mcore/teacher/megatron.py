"""The teacher as a frozen Megatron model in the training job, sharded over the same ranks as the student.

This module does not load weights (see `mcore.weights_io`). Invariant: scores cover the teacher's full vocabulary in
float32. They are on the last pipeline stage, in the row order of the micro-batches, and never leave the device.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tropd_mcore.data.packing import PackedStep
from tropd_mcore.errors import TeacherError
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.scoring import score_micro_batches
from tropd_mcore.types import Rollout, TeacherScores


class MegatronTeacher:
    """Scores packs with one forward pass of `model`, at temperature 1.

    `k` is the number of top-k candidates. `keep_hidden` adds the hidden states, for a divergence over the whole
    vocabulary. `excluded` are ids that cannot be candidates because the student's tokenizer lacks them. `key` is the
    teacher's section, for messages.
    """

    def __init__(
        self,
        model: Model,
        *,
        k: int,
        settings: LossSettings,
        keep_hidden: bool = False,
        excluded: Sequence[int] = (),
        key: str = "teacher",
    ) -> None:
        assert not model.trainable, "a teacher is frozen"
        if k + len(excluded) > model.arch.vocab_size:
            raise TeacherError(
                f"the objective's topk={k} is wider than the teacher's vocabulary of {model.arch.vocab_size} without "
                f"the {len(excluded)} tokens that {key}.extra_tokens=exclude takes out; lower it"
            )
        self._model = model
        self._k = k
        self._settings = settings
        self._keep_hidden = keep_hidden
        self._excluded = tuple(excluded)

    def score(
        self,
        rollouts: list[Rollout],
        packed: PackedStep,
        own_ids: Sequence[Tensor | None],
        verdicts: Sequence[bool | None],
    ) -> list[TeacherScores | None]:
        """Return the scores of each micro-batch in order; None on all but the last stage. Collective.

        `own_ids[i]`, int64 [T, L]: additional ids of micro-batch i to score (log q). `rollouts` and `verdicts` are not
        used, because the packs hold the tokens.
        """
        return score_micro_batches(
            self._model,
            packed.micro_batches,
            packed.pack_length,
            k=self._k,
            settings=self._settings,
            extra_ids=own_ids,
            keep_hidden=self._keep_hidden,
            excluded=self._excluded,
        )
