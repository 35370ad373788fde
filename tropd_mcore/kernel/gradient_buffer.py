"""Where the gradient of a chunk's logits is written."""

from __future__ import annotations

import torch
from torch import Tensor

from tropd_mcore.kernel.backend import Backend
from tropd_mcore.kernel.source import LogitSource, OutputLayer


class GradientBuffer:
    """Room for the gradient dz of each chunk's logits.

    Given logits: the rows of `given_TW`, which may be the logits themselves.
    An output layer's logits: over them if they have the dtype that the matrix products want, else a narrower matrix
    [C, W]. That one lies in the first half of each row of the logits, or, if the backend cannot do this, in memory of
    its own that all chunks share.
    """

    def __init__(self, source: LogitSource, backend: Backend, given_TW: Tensor | None = None) -> None:
        assert isinstance(source, OutputLayer) or given_TW is not None, "given logits need room for their gradient"
        self._given_TW = None if isinstance(source, OutputLayer) else given_TW
        self._dtype = source.hidden_TD.dtype if isinstance(source, OutputLayer) else source.logits_TW.dtype
        self._backend = backend
        self._buffer: Tensor | None = None

    def of(self, logits_CW: Tensor, rows: slice) -> Tensor:
        """Room for dz of these logits."""
        if self._given_TW is not None:
            return self._given_TW[rows]
        if logits_CW.dtype == self._dtype:
            return logits_CW
        if self._backend.shrinks_in_place:
            return logits_CW.view(self._dtype)[:, : logits_CW.shape[1]]
        if self._buffer is None:
            self._buffer = torch.empty_like(logits_CW, dtype=self._dtype)
        return self._buffer[: logits_CW.shape[0]]
