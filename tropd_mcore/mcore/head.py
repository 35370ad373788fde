"""Replaces the output layer's forward pass: the model returns the hidden states of supervised positions.

The loss receives these hidden states and the layer's weight, and computes the logits itself. Prompts and padding
therefore cost no logits. This module does not compute the loss. Invariant: every parameter gets the gradient that it
would get if all logits were computed and the unsupervised rows dropped.

Legend: P positions on this context rank, T rows, D hidden, W vocabulary shard.
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from tropd_mcore.kernel.source import GivenLogits, OutputLayer


class OutputLayerTap:
    """Replaces the output layer's forward: hidden [P, 1, D] -> [T, 1, D], the positions in `rows`.

    Set `rows` before each forward pass. The layer stays in the model with its weight. The hooks of the data-parallel
    wrapper stay too; they gather that weight before it is used. With sequence parallelism the hidden states are
    gathered here. The backward of that gather sums the partial gradients of the tensor ranks and scatters the sum.
    """

    def __init__(self, module: GPTModel, tp_group: ProcessGroup, sequence_parallel: bool) -> None:
        self.rows: Tensor | None = None
        self.reduces_hidden_gradient = not sequence_parallel and tp_group.size() > 1
        """Whether the code that computes dH must also sum it over the tensor ranks."""
        self._module = module
        self._tp_group = tp_group
        self._gather = sequence_parallel
        layer: ColumnParallelLinear = module.output_layer
        names = ("sequence_parallel", "allreduce_dgrad", "disable_grad_reduce")
        self._flags = {name: getattr(layer, name) for name in names}
        if sequence_parallel:
            # `_select` gathers already. If the layer gathered too, or reduced dH, both would happen twice.
            layer.sequence_parallel = False
            layer.allreduce_dgrad = False
            layer.disable_grad_reduce = True
        self._project = layer.forward
        layer.forward = self._select

    def remove(self) -> None:
        """Restore the layer's own forward and flags."""
        layer = self._module.output_layer
        layer.forward = self._project
        for name, value in self._flags.items():
            setattr(layer, name, value)

    @property
    def weight_WD(self) -> Tensor:
        """This rank's rows of the output embedding. If embeddings are tied, this is the input embedding."""
        if self._module.share_embeddings_and_output_weights:
            weight: Tensor = self._module.shared_embedding_or_output_weight()
            return weight
        return self._module.output_layer.weight

    def output_layer(self, hidden_TD: Tensor) -> OutputLayer:
        """Return the input from which the loss computes logits."""
        return OutputLayer(hidden_TD, self.weight_WD)

    def given_logits(self, layer: OutputLayer) -> GivenLogits:
        """Compute the logits of all rows at once with Megatron's own layer, in the dtype of its weight.

        Returns a view of the layer's result, because a copy would need a second matrix [T, W] in the backward pass.
        """
        missing = 0 if layer.tokens else 1  # pad to one row: Megatron's gradient kernels do not support zero rows
        hidden_T1D = F.pad(layer.hidden_TD, (0, 0, 0, missing))[:, None]
        logits_T1W, _ = self._project(hidden_T1D, weight=layer.weight_WD)
        logits_TW = logits_T1W.flatten(0, 1)
        return GivenLogits(logits_TW[:0] if missing else logits_TW)

    def _select(
        self, hidden_P1D: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Gather over the tensor ranks if needed, then select the rows.

        Signature and return value are those of Megatron's layer: (result, bias that the caller adds).
        """
        assert self.rows is not None, "rows must be set before the forward pass"
        if self._gather:
            hidden_P1D = gather_from_sequence_parallel_region(
                hidden_P1D, tensor_parallel_output_grad=True, group=self._tp_group
            )
        return hidden_P1D.index_select(0, self.rows), None


def nothing_of(layer: OutputLayer) -> Tensor:
    """Return a zero that depends on the hidden states and on the weight: the loss of a filler micro-batch.

    Its backward pass reaches every parameter. Gradient hooks then run on every rank, and collectives stay in step.
    """
    return layer.hidden_TD[:0].sum() + layer.weight_WD[:0].sum()
