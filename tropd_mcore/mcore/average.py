"""A moving average of the student's weights: a frozen model of the same shards that follows the student.

For the teacher that is the student itself (`teacher.self_teacher`). Not for scoring with it, and not for the format of
its checkpoint (`checkpoint`). Invariants: rank by rank, chunk by chunk, average and student have the same parameters
cut the same way; the average is a float32 number whatever the dtype of the model that scores with it, because a small
rate times a small difference is less than half a bfloat16 step and would be rounded away for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor

from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import ParallelConfig
from tropd_mcore.mcore.model import Model, build_model
from tropd_mcore.mcore.weights_io import synchronize_parameters

KEY = "average"
"""First part of the names of its tensors in a checkpoint."""


class WeightAverage:
    """average += rate * (student - average) after each optimizer step, from the student as it is now.

    `model` is what scores: the average rounded to `dtype`. Costs that model and, unless it is float32 itself, four more
    bytes a parameter. rate = 1 is the student of the last step, rate = 0 the one of now.
    """

    def __init__(self, student: Model, parallel: ParallelConfig, *, dtype: Dtype, rate: float) -> None:
        self.model = build_model(
            student.arch, parallel, student.layout, student.platform,
            dtype=dtype, trainable=False, cut_like_student=True,
        )  # fmt: skip
        self._student = student
        self._rate = rate
        self._rounded = [dict(module.named_parameters()) for module in self.model.modules]
        self._exact = [{name: value.detach().float() for name, value in chunk.items()} for chunk in self._rounded]
        with torch.no_grad():
            for theirs, exact, rounded in self._parameters():
                exact.copy_(theirs)
                rounded.copy_(exact)

    @torch.no_grad()
    def update(self) -> None:
        """Follow the student after an optimizer step; communicates only where its new weights are still gathered."""
        for theirs, exact, rounded in self._parameters():
            exact.lerp_(theirs.float(), self._rate)  # at rates 0 and 1 an end point, exactly
            rounded.copy_(exact)

    def sharded_state(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        """Megatron's description of the float32 numbers, from that of each chunk of `model`."""
        return {
            str(index): {
                name: make_sharded_optimizer_tensor(described, exact[name], prefix=KEY)
                for name, described in chunk.items()
            }
            for index, (chunk, exact) in enumerate(zip(chunks, self._exact, strict=True))
        }

    @torch.no_grad()
    def load_state(self, loaded: dict[str, Any]) -> None:
        """Take what was read for `sharded_state`."""
        for index, (exact, rounded) in enumerate(zip(self._exact, self._rounded, strict=True)):
            for name, value in exact.items():
                value.copy_(loaded[str(index)][name])
                rounded[name].copy_(value)

    def _parameters(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(the student's as it is now, the float32 average, the one that scores) of each parameter of this rank."""
        synchronize_parameters(self._student)
        for module, exact, rounded in zip(self._student.modules, self._exact, self._rounded, strict=True):
            theirs: dict[str, Tensor] = dict(module.named_parameters())
            assert theirs.keys() == exact.keys(), "average and student are cut differently"
            yield from ((theirs[name], exact[name], rounded[name]) for name in exact)
