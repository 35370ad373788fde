"""Keeps the weights of a frozen model in host memory while nobody asks it.

`teacher.offload` uses it. The room on the device is then free for the student's activations. This module does not
decide when a model is asked: `scoring` opens `resident`. Invariants: the host copy is made once and never written
again. Outside `resident` the model has no weights on its device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class HostWeights:
    """The weights of a frozen model in host memory, pinned if its device is a GPU."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> None:
        """Copy `parameters`, which are on `device`, and drop them there. Each parameter is given once."""
        self._device = device
        self._kept = [(parameter, self._copy(parameter.detach())) for parameter in parameters]
        assert not any(parameter.requires_grad for parameter, _ in self._kept), "an optimizer would move them"
        self._drop()

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Have the weights on the device for the block. The copy runs in the order of the device's current stream."""
        try:
            for parameter, host in self._kept:
                parameter.data = host.to(self._device, non_blocking=True, copy=True)
            yield
        finally:
            self._drop()

    def _copy(self, weight: Tensor) -> Tensor:
        host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=self._device.type == "cuda")
        return host.copy_(weight)

    def _drop(self) -> None:
        for parameter, host in self._kept:
            parameter.data = torch.empty(0, dtype=host.dtype, device=self._device)
