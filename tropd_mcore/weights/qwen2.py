"""Weight rules of dense Qwen2 and Qwen2.5 models: a bias on query, key and value, none on the output projection."""

from __future__ import annotations

from tropd_mcore.weights.architecture import Architecture
from tropd_mcore.weights.dense import dense_table, qkv_rule
from tropd_mcore.weights.mapping import Rule


def table(arch: Architecture) -> list[Rule]:
    """Return the rules of a Qwen2 model. Source: transformers `Qwen2ForCausalLM`."""
    return dense_table(arch, attention_extras=[qkv_rule(arch, "bias")])
