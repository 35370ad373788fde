"""The tensors that every update must contain, and the buckets of a checked stream.

Invariant: a tensor is in a bucket only if the plan has it with the same shape and dtype, and it did not come before.
The last bucket comes only after every tensor of the plan has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tropd_mcore.errors import ServerError
from tropd_mcore.serving.weight_routes import Bucket

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that every update must contain: unsharded, with its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightPlan:
    """The tensors of an update."""

    def __init__(self, plan: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
        self.tensors = {name: PlannedTensor(name, tuple(shape), dtype) for name, shape, dtype in plan}
        assert self.tensors, "a plan without tensors"
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.largest = max(tensor.nbytes for tensor in self.tensors.values())
        """Bytes of the largest tensor."""

    def __len__(self) -> int:
        return len(self.tensors)

    def sends_float32(self) -> bool:
        """Whether a tensor is float32."""
        return any(str(tensor.dtype) == "torch.float32" for tensor in self.tensors.values())

    def buckets(self, tensors: Iterator[tuple[str, Tensor]], limit: int, *, key: str) -> Iterator[Bucket]:
        """Yield whole tensors in order, as many as fit into `limit` bytes, at least one.

        `key` names the servers in messages. Raises ServerError if a tensor is unknown, repeated, missing or has another
        shape or dtype.
        """
        missing = dict(self.tensors)
        bucket: Bucket = []
        size = 0
        for name, tensor in tensors:
            self._check(name, tensor, missing, key)
            del missing[name]
            if bucket and size + tensor.nbytes > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append((name, tensor))
            size += tensor.nbytes
        if missing:
            raise ServerError(
                f"{key}: {len(missing)} of {len(self)} tensors are missing from the weights to publish, the first is "
                f"{next(iter(missing))}"
            )
        yield bucket

    def _check(self, name: str, tensor: Tensor, missing: dict[str, PlannedTensor], key: str) -> None:
        planned = self.tensors.get(name)
        if planned is None:
            raise ServerError(f"{key}: {name} is not a tensor of the plan ({len(self)} tensors)")
        if name not in missing:
            raise ServerError(f"{key}: {name} comes twice in one update")
        if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
            raise ServerError(
                f"{key}: {name} is {tensor.dtype} {list(tensor.shape)}; the plan says "
                f"{planned.dtype} {list(planned.shape)}"
            )
