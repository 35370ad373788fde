"""The teacher as a frozen Megatron model in the training job, sharded over the same ranks as the student.

Not for loading weights (`mcore.weights_io`). Invariant: scores are of the teacher's full vocabulary in float32, on the
last pipeline stage, aligned with the rows of the micro-batches; no number leaves the device.
"""

from __future__ import annotations

from tropd_mcore.data.packing import PackedStep
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.scoring import score_micro_batches
from tropd_mcore.types import Rollout, TeacherScores


class MegatronTeacher:
    """Scores packs with one forward pass of `model`.

    `temperature` divides the teacher's logits; `k` is the size of the support, `chunk_tokens` the rows of one chunk of
    the vocabulary kernels.
    """

    def __init__(self, model: Model, *, k: int, chunk_tokens: int, temperature: float = 1.0) -> None:
        assert not model.trainable, "a teacher is frozen"
        self._model = model
        self._k = k
        self._chunk_tokens = chunk_tokens
        self._temperature = temperature

    def score(self, rollouts: list[Rollout], packed: PackedStep) -> list[TeacherScores | None]:
        """Return the scores of each micro-batch in order; None on all but the last stage. Collective.

        `rollouts` are not looked at: the packs hold their tokens.
        """
        return score_micro_batches(
            self._model,
            packed.micro_batches,
            packed.pack_length,
            k=self._k,
            chunk_tokens=self._chunk_tokens,
            temperature=self._temperature,
        )
