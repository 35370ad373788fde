"""Connects the loss to Megatron-Core models in other trainers.

The model returns hidden states instead of logits, and the loss computes the logits itself. `import tropd_mcore` does
not load this module, because it imports megatron. The trainer of this project does not use it (see `mcore.head`).
"""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from tropd_mcore.library.arguments import OutputLayer
from tropd_mcore.mcore.head import OutputLayerTap


class HiddenStates(OutputLayerTap):
    """Handle that `tap_output_layer` returns."""

    def output_layer(self, hidden_TD: Tensor) -> OutputLayer:  # type: ignore[override]
        """Return the argument for `distill_loss` from the hidden states [*T, D] that the model returned.

        A selection of these hidden states is also allowed.
        """
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
    """Make `model` return hidden states [b, s, D] instead of logits when it is called without labels.

    Call it on the last pipeline stage, before the model is wrapped in DDP. The output layer stays in the model with its
    weight and the hooks of the data-parallel wrapper. With sequence parallelism the hidden states are gathered, and the
    backward of that gather sums their gradient. Undo it with `tap.remove()`.
    """
    return HiddenStates(model, tp_group, bool(model.config.sequence_parallel))
