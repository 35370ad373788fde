"""Weight rules of dense Llama 2 and 3 models, which have no head norms and no biases."""

from __future__ import annotations

from tropd_mcore.weights.architecture import Architecture
from tropd_mcore.weights.dense import dense_table
from tropd_mcore.weights.mapping import Rule


def table(arch: Architecture) -> list[Rule]:
    """Return the rules of a Llama model. Source: transformers `LlamaForCausalLM`."""
    return dense_table(arch, attention_extras=[])
