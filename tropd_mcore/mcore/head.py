"""The end of the last stage: supervised positions only, and the output layer left to whoever needs its logits.

Not for the loss. Prompts and padding cost no logits, and none are made here: the model returns hidden states, which the
loss takes together with the layer's weight. Invariant: the gradient of every parameter is what it would be if all
logits were computed and the other rows dropped.

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
    """Takes the place of the output layer's forward: hidden [P, 1, D] becomes [T, 1, D] of the rows set before.

    The layer stays where it is, with its weight and with the hooks of the data-parallel wrapper, which gather that
    weight in time. With sequence parallelism the hidden states are gathered here, and the partial gradients of the
    tensor ranks are summed and scattered by that gather's backward.
    """

    def __init__(self, module: GPTModel, tp_group: ProcessGroup, sequence_parallel: bool) -> None:
        self.rows: Tensor | None = None
        self.reduces_hidden_gradient = not sequence_parallel and tp_group.size() > 1
        """Whether who makes dH has to sum it over the tensor ranks."""
        self._module = module
        self._tp_group = tp_group
        self._gather = sequence_parallel
        layer: ColumnParallelLinear = module.output_layer
        names = ("sequence_parallel", "allreduce_dgrad", "disable_grad_reduce")
        self._flags = {name: getattr(layer, name) for name in names}
        if sequence_parallel:
            layer.sequence_parallel = False
            layer.allreduce_dgrad = False
            layer.disable_grad_reduce = True
        self._project = layer.forward
        layer.forward = self._select

    def remove(self) -> None:
        """Leave the layer as it was."""
        layer = self._module.output_layer
        layer.forward = self._project
        for name, value in self._flags.items():
            setattr(layer, name, value)

    @property
    def weight_WD(self) -> Tensor:
        """This rank's rows of the output embedding, which is the input embedding where the two are tied."""
        if self._module.share_embeddings_and_output_weights:
            weight: Tensor = self._module.shared_embedding_or_output_weight()
            return weight
        return self._module.output_layer.weight

    def output_layer(self, hidden_TD: Tensor) -> OutputLayer:
        """What the loss makes its logits from."""
        return OutputLayer(hidden_TD, self.weight_WD)

    def given_logits(self, layer: OutputLayer) -> GivenLogits:
        """The logits of all rows at once, by Megatron's own layer and in the dtype of its weight.

        That layer gets one row at least, because its gradient kernels are not made for none. A view of its result, so
        that no second matrix [T, W] is made in the backward pass.
        """
        missing = 0 if layer.tokens else 1
        hidden_T1D = F.pad(layer.hidden_TD, (0, 0, 0, missing))[:, None]
        logits_T1W, _ = self._project(hidden_T1D, weight=layer.weight_WD)
        logits_TW = logits_T1W.flatten(0, 1)
        return GivenLogits(logits_TW[:0] if missing else logits_TW)

    def _select(
        self, hidden_P1D: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """The signature is Megatron's: (result, bias that somebody else adds)."""
        assert self.rows is not None, "rows must be set before the forward pass"
        if self._gather:
            hidden_P1D = gather_from_sequence_parallel_region(
                hidden_P1D, tensor_parallel_output_grad=True, group=self._tp_group
            )
        return hidden_P1D.index_select(0, self.rows), None


def nothing_of(layer: OutputLayer) -> Tensor:
    """A zero that depends on the hidden states and on the weight, for a pack that nothing is asked of.

    Its backward pass reaches every parameter, so that hooks run and collectives stay in step.
    """
    return layer.hidden_TD[:0].sum() + layer.weight_WD[:0].sum()
