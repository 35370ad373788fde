"""The output layer on the supervised positions only: prompts and padding cost no logits.

Not for the loss. Invariant: the gradient of every parameter is what it would be if all logits were computed and the
other rows dropped.

Legend: P positions on this context rank, T rows, D hidden, W vocabulary shard.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup


class HeadRows:
    """A forward pre-hook of Megatron's output layer: hidden [P, 1, D] becomes [max(T, 1), 1, D].

    `rows` is set before each forward. The layer sees one row at least, because its gradient kernels are not made for
    none; the caller drops it. With sequence parallelism the hidden states are gathered here rather than in the layer,
    and the partial gradients of the tensor ranks are summed and scattered by that gather's backward.
    """

    def __init__(self, output_layer: ColumnParallelLinear, tp_group: ProcessGroup, sequence_parallel: bool) -> None:
        self.rows: Tensor | None = None
        self._tp_group = tp_group
        self._gather = sequence_parallel
        if sequence_parallel:
            output_layer.sequence_parallel = False
            output_layer.allreduce_dgrad = False
            output_layer.disable_grad_reduce = True
        output_layer.register_forward_pre_hook(self._select)

    def _select(self, layer: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.rows is not None, "rows must be set before the forward pass"
        hidden = args[0]
        if self._gather:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self._tp_group
            )
        rows = self.rows if self.rows.numel() else self.rows.new_zeros(1)
        return (hidden.index_select(0, rows), *args[1:])
