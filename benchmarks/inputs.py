"""Inputs of the benchmarks: random student logits, sampled tokens and a teacher's top-k.

Shapes: N tokens, W vocabulary shard of this rank, k teacher top-k, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.kernel.backend import Backend, Kernel
from tropd_mcore.kernel.shard import Scaling, VocabShard


@dataclass(frozen=True)
class Tokens:
    """Per-token inputs, the same on all ranks."""

    target_T: Tensor
    topk_ids_TK: Tensor
    topk_logp_TK: Tensor
    """log q over the whole vocabulary"""
    advantage_T: Tensor
    """advantage A of the K1 term"""
    entropy_weight_T: Tensor


class Upstream(torch.autograd.Function):
    """Stands for an output layer: returns logits and receives their gradient, whose squared norm it can record."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits_TW: Tensor, squares: list[float] | None) -> Tensor:
        """`anchor` is a scalar that requires grad, so the result requires grad too."""
        ctx.squares = squares
        return logits_TW.view_as(logits_TW)

    @staticmethod
    def backward(ctx: Any, grad_TW: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the logits ends here."""
        if ctx.squares is not None:
            ctx.squares.append(float(torch.linalg.vector_norm(grad_TW, dtype=torch.float64)) ** 2)
        return grad_TW.new_zeros(()), None, None


def shard_of(vocabulary: int) -> VocabShard:
    """Return this rank's equal part of the vocabulary."""
    width = vocabulary // dist.get_world_size()
    return VocabShard(dist.get_rank() * width, (dist.get_rank() + 1) * width, vocabulary)


def kernel_of(vocabulary: int, backend: Backend, chunk_tokens: int) -> Kernel:
    """Return the kernel for the group of all ranks."""
    group = dist.group.WORLD
    assert group is not None
    return Kernel(shard_of(vocabulary), group, backend, Scaling(), chunk_tokens)


def make_tokens(tokens: int, vocabulary: int, k: int, *, seed: int = 1, device: str = "cpu") -> Tokens:
    """Return random ids, distinct within a row's top-k. In every other row the sampled token is one of the top-k."""
    random = torch.Generator().manual_seed(seed)
    stride = max(vocabulary // max(k, 1), 1)
    first_T1 = torch.randint(stride, (tokens, 1), generator=random)
    topk_ids_TK = first_T1 + stride * torch.arange(k)
    target_T = torch.randint(vocabulary, (tokens,), generator=random)
    if k:
        target_T[::2] = topk_ids_TK[::2, 0]
    logp_TK = torch.randn(tokens, k, generator=random).sort(dim=1, descending=True).values.log_softmax(dim=1) - 0.01
    return Tokens(
        target_T.to(device),
        topk_ids_TK.to(device),
        logp_TK.to(device),
        torch.randn(tokens, generator=random).to(device),
        torch.full((tokens,), 1e-2, device=device),
    )


def make_logits(tokens: int, width: int, *, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return this rank's shard of the logits."""
    return 2.0 * torch.randn(tokens, width, generator=torch.Generator().manual_seed(100 + rank)).to(dtype)


def with_main_grad(weight_WD: Tensor) -> Tensor:
    """Return a new leaf with a float32 `main_grad` for its gradient, as Megatron's data-parallel wrapper makes it."""
    leaf = weight_WD.detach().clone().requires_grad_(True)
    leaf.main_grad = torch.zeros_like(leaf, dtype=torch.float32, requires_grad=False)  # type: ignore[attr-defined]
    leaf.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return leaf
