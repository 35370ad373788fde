"""Where the gradient of a chunk's logits is written."""

from __future__ import annotations

import torch
from torch import Tensor

from tropd_mcore.losses.kernel.backend import Backend
from tropd_mcore.losses.kernel.source import LogitSource, OutputLayer


class GradientBuffer:
    """Over the logits where these have the dtype that the matrix products want, else a narrower matrix [C, W].

    That one lies in the first half of each row of the logits, or, where the backend cannot do this, in memory of its
    own that all chunks share.
    """

    def __init__(self, source: LogitSource, backend: Backend) -> None:
        self._dtype = source.hidden_TD.dtype if isinstance(source, OutputLayer) else source.logits_TW.dtype
        self._backend = backend
        self._buffer: Tensor | None = None

    def of(self, logits_CW: Tensor) -> Tensor:
        """Room for dz of these logits."""
        if logits_CW.dtype == self._dtype:
            return logits_CW
        if self._backend.shrinks_in_place:
            return logits_CW.view(self._dtype)[:, : logits_CW.shape[1]]
        if self._buffer is None:
            self._buffer = torch.empty_like(logits_CW, dtype=self._dtype)
        return self._buffer[: logits_CW.shape[0]]
