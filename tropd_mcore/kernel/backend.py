"""The backend protocol: the two passes over a chunk's logits, the costly part of a loss besides its matrix products.

A backend knows nothing about ranks, chunks or objectives. Invariant: all backends give the same numbers within the
tolerances of docs/numerics.md; `eager` is the definition.

Shapes: C tokens of a chunk, W width of this rank's vocabulary shard, R <= W its real columns, J support ids per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tropd_mcore.kernel.group import Group
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.sentinels import NO_ENTRY


@dataclass(frozen=True)
class RowGradient:
    """The coefficients of the gradient of a chunk's logits. L is the loss, z' the scaled logits (see `Scaling`).

        dL/dz'_v = -(sum_j g_j) p_v + sum_j g_j [v = ids_j] - g_H p_v (log p_v + H) + dense_v

    with p = softmax(z') and H its entropy, since dlog p_j/dz'_v = [v = j] - p_v and dH/dz'_v = -p_v (log p_v + H).
    """

    ids_CJ: Tensor
    """int64, global; NO_ENTRY where unused"""
    grad_logp_CJ: Tensor
    """g_j = dL/dlog p; 0 if the id is NO_ENTRY"""
    grad_entropy_C: Tensor | None
    """g_H = dL/dH; None = 0"""
    lse_C: Tensor
    entropy_C: Tensor
    unique_run_lengths: tuple[int, ...]
    """Lengths of consecutive runs of the J slots in which no id appears twice; they add up to J."""
    dense_CR: Tensor | None = None
    """A further dL/dz', math dtype; None = 0"""
    live_C: Tensor | None = None
    """bool, rows that have a gradient at all; None = every row. The others get 0 whatever their logits are. A masked
    row may hold NaN or infinities, and 0 * NaN would reach the sum over rows in dW."""


def grad_of_used_slots(grad_logp_CJ: Tensor | None, ids_CJ: Tensor, like: Tensor) -> Tensor:
    """Return `RowGradient.grad_logp_CJ` from what autograd gives; None = 0, in the dtype of `like`.

    An unused slot has no column, but its g_j would still count in sum_j g_j.
    """
    if grad_logp_CJ is None:
        return like.new_zeros(ids_CJ.shape)
    return grad_logp_CJ.masked_fill(ids_CJ == NO_ENTRY, 0.0)


def rows_with_gradient(grad_logp_CJ: Tensor, *further_C: Tensor | None) -> Tensor:
    """Return `RowGradient.live_C`: rows in which any of these derivatives is not 0 (NaN is not 0). No host sync."""
    live_C = (grad_logp_CJ != 0).any(dim=1)
    for grad_C in further_C:
        if grad_C is not None:
            live_C = live_C | (grad_C != 0)
    return live_C


def finite_where_live(hidden_CD: Tensor, live_C: Tensor) -> Tensor:
    """Return the hidden states with 0 in rows without a gradient.

    dz is 0 in these rows, but 0 times a NaN of the hidden states would make dz.T @ hidden NaN. Costs a copy of [C, D]
    on a GPU. On a CPU, where looking at the mask is free, it costs one only if there is such a row.
    """
    if live_C.device.type == "cpu" and bool(live_C.all()):
        return hidden_CD
    return hidden_CD.masked_fill(~live_C[:, None], 0.0)


class Backend(Protocol):
    """Two passes over the logits of a chunk."""

    name: str
    shrinks_in_place: bool
    """Whether `write_gradient` may be given the first half of each float32 row as its bfloat16 output"""

    def stats_and_support(
        self, logits_CW: Tensor, ids_CJ: Tensor, shard: VocabShard, scaling: Scaling
    ) -> tuple[Tensor, Tensor]:
        """Pass 1: ((m, s, u) of the shard's real columns [C, 3], z' of the ids in this shard and 0 elsewhere [C, J]).

        Math dtype. m = max z', s = sum e^(z'-m), u = sum e^(z'-m) (z'-m); (LEAST_LOGIT, 0, 0) without real columns.
        A logit of -inf counts as LEAST_LOGIT in m, s and u, and stays -inf among the ids.
        Reads the logits once and does not change them.
        """
        ...

    def write_gradient(
        self, logits_CW: Tensor, row: RowGradient, shard: VocabShard, scaling: Scaling, out_CW: Tensor
    ) -> None:
        """Pass 2: write dL/dz to `out_CW`, 0 in padding columns. `out_CW` may be the logits, or have a narrower dtype.

        Computed in the math dtype. The support's part is added before the one rounding to the dtype of `out_CW`. Rows
        outside `row.live_C` get 0, whatever their logits are.
        """
        ...


@dataclass(frozen=True)
class Kernel:
    """The arguments that every function of the kernel takes: how the logits of a job are read."""

    shard: VocabShard
    group: Group
    backend: Backend
    scaling: Scaling
    chunk_tokens: int
    """Rows of one chunk; bounds the temporary memory"""
    overlap: bool = False
    """Start the next chunk while this one's all-reduce runs (an output layer's logits only)"""

    def __post_init__(self) -> None:
        """Refuse a missing group: torch.distributed would take None for all ranks of the job."""
        assert self.group is not None, "a group of None means the whole world to torch.distributed"
        assert self.chunk_tokens > 0, f"chunks of {self.chunk_tokens} rows"
