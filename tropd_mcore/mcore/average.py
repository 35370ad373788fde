"""A moving average of the student's weights: a frozen model of the same shards that follows the student.

The self-teacher (`teacher.self_teacher`) scores with it. This module does not score, and it does not define the
checkpoint format (`checkpoint`). Invariants: on every rank and in every chunk, average and student have the same
parameters, sharded the same way. The average is kept in float32 whatever the dtype of the model that scores with it.
A small rate times a small difference is less than half a bfloat16 step, so a bfloat16 average would never move.
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
"""Prefix of the names of the average's tensors in a checkpoint."""


class WeightAverage:
    """Starts as a copy of the student; after each optimizer step, average += rate * (student - average).

    `model` is the model that scores: the average rounded to `dtype`. The memory cost is that model and, unless `dtype`
    is float32, four more bytes per parameter. With rate = 1 the average is the student after the latest optimizer step.
    With rate = 0 it stays the student that it was built from.
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
        """Follow the student after an optimizer step.

        Communicates only if the student's new weights have not been gathered from the data ranks yet.
        """
        for theirs, exact, rounded in self._parameters():
            exact.lerp_(theirs.float(), self._rate)  # exact at both ends: rate 0 changes nothing, rate 1 copies
            rounded.copy_(exact)

    def sharded_state(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        """Return Megatron's sharding description of the float32 average, derived from that of each chunk of `model`."""
        return {
            str(index): {
                name: make_sharded_optimizer_tensor(described, exact[name], prefix=KEY)
                for name, described in chunk.items()
            }
            for index, (chunk, exact) in enumerate(zip(chunks, self._exact, strict=True))
        }

    @torch.no_grad()
    def load_state(self, loaded: dict[str, Any]) -> None:
        """Copy in the tensors that were read for `sharded_state`."""
        for index, (exact, rounded) in enumerate(zip(self._exact, self._rounded, strict=True)):
            for name, value in exact.items():
                value.copy_(loaded[str(index)][name])
                rounded[name].copy_(value)

    def _parameters(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (student's current value, float32 average, value in the scoring model) per parameter of this rank."""
        synchronize_parameters(self._student)
        for module, exact, rounded in zip(self._student.modules, self._exact, self._rounded, strict=True):
            theirs: dict[str, Tensor] = dict(module.named_parameters())
            assert theirs.keys() == exact.keys(), "average and student are cut differently"
            yield from ((theirs[name], exact[name], rounded[name]) for name in exact)
