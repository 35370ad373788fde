"""The source of a chunk's logits: a given matrix, or an output layer that computes one chunk at a time.

This module does not use the logits. Invariant: logits of an `OutputLayer` are float32 (float64 from float64) and never
rounded to the dtype of the weights. Probability ratios from bfloat16 logits are off by several percent
(docs/numerics.md).

Shapes: T tokens, C tokens of a chunk, W vocabulary shard, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tropd_mcore.kernel.shard import chunks
from tropd_mcore.kernel.surroundings import saved_tensor_hooks_are_active

OLDEST_TORCH = (2, 8)
"""The oldest tested version (on a CPU). It introduced `mm(out_dtype=)`, which a GPU needs."""
ACCUMULATING_PRODUCT = (2, 11)
"""The oldest version on which `addmm(out_dtype=)` was tested on a GPU with a float32 sum. It was broken until 2.10 at
the earliest (pytorch issue 154086). Older versions use a product and a sum instead, at the cost of one buffer."""
CPU_BLOCK = 4096
"""Vocabulary columns that are converted at once if there is no mixed-precision matrix product (CPU)."""


@dataclass(frozen=True)
class GivenLogits:
    """Logits that the caller computed."""

    logits_TW: Tensor
    preserve: bool = False
    """Leave the logits unchanged. Their gradient then takes a buffer of their size, [T, W] in their dtype. Set this if
    something else needs the logits after this loss's backward pass: another loss, an operation that saved its own
    result (tanh), another call on a slice of the same logits, a metric."""

    @property
    def tensors(self) -> tuple[Tensor, None]:
        """The tensors that autograd differentiates: the logits, no weight."""
        return self.logits_TW, None

    @property
    def tokens(self) -> int:
        """T."""
        return self.logits_TW.shape[0]

    @property
    def width(self) -> int:
        """W."""
        return self.logits_TW.shape[1]

    def logits(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Return a view of the rows; `out` is not used."""
        return self.logits_TW[rows]

    def buffer(self, chunk_tokens: int) -> Tensor | None:
        """Return None: the logits exist already."""
        return None

    def may_be_overwritten(self) -> bool:
        """Whether the gradient may be written over the logits, as far as the forward pass can tell.

        It may not if the caller needs the logits: they are a leaf or a view of one, or `preserve` is set. It may not if
        saved tensors pass through hooks, because autograd then cannot notice another reader. It may not if several rows
        share memory.
        """
        logits_TW = self.logits_TW
        rows_are_apart = logits_TW.stride(0) >= logits_TW.shape[1] * logits_TW.stride(1)
        base = logits_TW._base
        of_a_leaf = logits_TW.is_leaf or (base is not None and base.is_leaf and base.requires_grad)
        return rows_are_apart and not (self.preserve or of_a_leaf or saved_tensor_hooks_are_active())


@dataclass(frozen=True)
class OutputLayer:
    """Hidden states and this rank's rows of the output embedding."""

    hidden_TD: Tensor
    weight_WD: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The tensors that autograd differentiates: hidden states and weight."""
        return self.hidden_TD, self.weight_WD

    @property
    def tokens(self) -> int:
        """T."""
        return self.hidden_TD.shape[0]

    @property
    def width(self) -> int:
        """W."""
        return self.weight_WD.shape[0]

    def buffer(self, chunk_tokens: int) -> Tensor:
        """Return memory for the logits of one chunk."""
        rows, columns = min(chunk_tokens, self.tokens), self.weight_WD.shape[0]
        return torch.empty(rows, columns, dtype=accumulation_dtype(self.hidden_TD), device=self.hidden_TD.device)

    def logits(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Return hidden @ weight.T of the rows, [C, W], written to the first rows of `out` if it is given."""
        hidden_CD = self.hidden_TD[rows].detach()
        out = self.buffer(hidden_CD.shape[0]) if out is None else out[: hidden_CD.shape[0]]
        return matmul_into(out, hidden_CD, self.weight_WD.detach().t(), accumulate=False)


LogitSource = GivenLogits | OutputLayer


def accumulation_dtype(operand: Tensor) -> torch.dtype:
    """Dtype in which a matrix product is stored: float64 for float64 operands, else float32."""
    return torch.float64 if operand.dtype == torch.float64 else torch.float32


def torch_version() -> tuple[int, int]:
    """Major and minor version of torch; a vendor's `2.9.0a0+nv25.10` is (2, 9)."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def matmul_into(out: Tensor, left: Tensor, right: Tensor, *, accumulate: bool) -> Tensor:
    """out = left @ right (+ out if `accumulate`), in the dtype of `out`, which may be wider than that of the operands.

    bfloat16 operands are multiplied exactly and summed in float32. A GPU does it by its mixed-precision product. On a
    CPU the operands are converted, the vocabulary's in blocks.
    """
    if out.dtype == left.dtype == right.dtype:
        return torch.addmm(out, left, right, out=out) if accumulate else torch.mm(left, right, out=out)
    if out.is_cuda:
        if accumulate and torch_version() < ACCUMULATING_PRODUCT:
            return out.add_(torch.mm(left, right, out_dtype=out.dtype))
        if accumulate:
            return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    for block, left_part, right_part in _blocks(out, left, right):
        torch.addmm(block, left_part.to(out.dtype), right_part.to(out.dtype), beta=float(accumulate), out=block)
    return out


def _blocks(out: Tensor, left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield parts of `out`, cut along its longer side, with the operands of each part."""
    rows, columns = out.shape
    if rows > columns:
        for part in chunks(rows, CPU_BLOCK):
            yield out[part], left[part], right
    else:
        for part in chunks(columns, CPU_BLOCK):
            yield out[:, part], left, right[:, part]
