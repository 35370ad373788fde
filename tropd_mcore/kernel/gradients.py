"""Where gradients are written: dz of a chunk's logits, and dW of an output embedding shard, summed over chunks.

dW is summed in float32. It follows the protocol of Megatron's data-parallel wrapper without importing it: a parameter
with `main_grad` gets its gradient there, in float32, and the autograd engine gets only a placeholder. Invariant: dW is
rounded to the parameter's dtype only if there is no `main_grad`.

Shapes: C tokens of a chunk, W vocabulary shard, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropd_mcore.kernel.backend import Backend
from tropd_mcore.kernel.source import LogitSource, OutputLayer, accumulation_dtype, matmul_into


class GradientBuffer:
    """Memory for the gradient dz of each chunk's logits.

    Given logits: the rows of `given_TW`, which may be the logits themselves.
    An output layer: the logits themselves, if they have the dtype of the hidden states, which the matrix products take.
    Otherwise dz is narrower than the logits, and is written to the first half of each of their rows. If the backend
    cannot do that, dz gets a separate buffer that all chunks share.
    """

    def __init__(self, source: LogitSource, backend: Backend, given_TW: Tensor | None = None) -> None:
        assert isinstance(source, OutputLayer) or given_TW is not None, "given logits need room for their gradient"
        self._given_TW = None if isinstance(source, OutputLayer) else given_TW
        self._dtype = source.hidden_TD.dtype if isinstance(source, OutputLayer) else source.logits_TW.dtype
        self._backend = backend
        self._buffer: Tensor | None = None

    def of(self, logits_CW: Tensor, rows: slice) -> Tensor:
        """Return the memory for dz of these logits, [C, W]."""
        if self._given_TW is not None:
            return self._given_TW[rows]
        if logits_CW.dtype == self._dtype:
            return logits_CW
        # float32 logits, bfloat16 dz: row r of dz is the first half of the bytes of row r of the logits.
        if self._backend.shrinks_in_place:
            return logits_CW.view(self._dtype)[:, : logits_CW.shape[1]]
        if self._buffer is None:
            self._buffer = torch.empty_like(logits_CW, dtype=self._dtype)
        return self._buffer[: logits_CW.shape[0]]


class WeightGradient:
    """dW = sum over chunks of dz.T @ hidden, [W, D].

    dW is linear in the factor of the backward pass, which is not known yet when chunks are added in the forward pass.
    So the sum is kept in a separate buffer and scaled in `finish`. `folded` assumes that the factor is 1: it adds to
    main_grad at once, needs no buffer, and lets the device check the factor when it is known.
    """

    def __init__(self, weight_WD: Tensor, *, folded: bool) -> None:
        self._weight = weight_WD
        # Megatron-FSDP keeps the gradient buffer of an earlier step as main_grad, but expects an ordinary gradient.
        owned_by_fsdp = getattr(weight_WD, "__fsdp_param__", False)
        self._main_grad: Tensor | None = None if owned_by_fsdp else getattr(weight_WD, "main_grad", None)
        self._folded = folded and self._main_grad is not None
        self._sum = self._main_grad if self._folded else None

    @property
    def adds_in_forward(self) -> bool:
        """Whether `add` changes main_grad directly. A repeated forward pass would then count twice."""
        return self._folded

    def add(self, dz_CW: Tensor, hidden_CD: Tensor) -> None:
        """Add one chunk."""
        first = self._sum is None
        if self._sum is None:
            dtype = accumulation_dtype(self._weight)
            self._sum = torch.empty_like(self._weight, dtype=dtype, requires_grad=False)
        # The first product initialises the buffer; main_grad already holds earlier micro-batches.
        matmul_into(self._sum, dz_CW.t(), hidden_CD, accumulate=not first)

    def finish(self, factor: Tensor) -> Tensor:
        """Scale by the scalar `factor` and deliver. Returns the tensor for the autograd engine. No host sync."""
        if self._folded:
            assert_is_one(factor)
        elif self._main_grad is not None and self._sum is not None:
            self._main_grad.addcmul_(self._sum, factor.to(self._sum.dtype))
        if self._main_grad is not None:
            return self._placeholder()
        if self._sum is None:
            return torch.zeros_like(self._weight, requires_grad=False)
        return self._sum.mul_(factor).to(self._weight.dtype)

    def _placeholder(self) -> Tensor:
        """The tensor that Megatron's hooks expect. They drop it, but add it if an embedding shares the parameter."""
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        if getattr(self._weight, "zero_out_wgrad", False):
            return torch.zeros_like(self._weight, requires_grad=False)
        return torch.empty_like(self._weight, requires_grad=False)


def assert_is_one(factor: Tensor) -> None:
    """Fail on the device if a gradient that must not be scaled would need scaling. No host sync."""
    torch._assert_async(factor == 1, "loss.weight_gradient=folded: the loss was scaled after it was made; use deferred")
