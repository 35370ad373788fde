"""For Megatron-Core models in other trainers: hidden states in place of logits, for the loss to make its own.

Apart from the names of `tropd_mcore`, because it imports megatron. Not for our own trainer (`mcore.head`).
"""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from tropd_mcore.library.arguments import OutputLayer
from tropd_mcore.mcore.head import OutputLayerTap


class HiddenStates(OutputLayerTap):
    """What `tap_output_layer` returns."""

    def output_layer(self, hidden_TD: Tensor) -> OutputLayer:  # type: ignore[override]
        """What `distill_loss` takes, of the hidden states [*T, D] that the model returned, or of some of them."""
        return OutputLayer(hidden_TD, self.weight_WD, reduce_hidden_grad=self.reduces_hidden_gradient)

    def _select(
        self, hidden_SBD: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        if self._gather:
            hidden_SBD = gather_from_sequence_parallel_region(
                hidden_SBD, tensor_parallel_output_grad=True, group=self._tp_group
            )
        return hidden_SBD, None


def tap_output_layer(model: GPTModel, tp_group: ProcessGroup) -> HiddenStates:
    """Let `model`, called without labels, return hidden states [b, s, D] in place of logits; call it before DDP wraps.

    For the last pipeline stage. The layer stays where it is, with its weight and the hooks of the data-parallel
    wrapper. With sequence parallelism the hidden states are gathered, and the backward of that gather sums their
    gradient. Undo it with `tap.remove()`.
    """
    return HiddenStates(model, tp_group, bool(model.config.sequence_parallel))
