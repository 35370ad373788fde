"""Weight rules of dense Qwen3 models: an RMSNorm on every query and key head, no bias."""

from __future__ import annotations

from tropd_mcore.weights.architecture import Architecture
from tropd_mcore.weights.dense import dense_table, head_norm_rules
from tropd_mcore.weights.mapping import Rule


def table(arch: Architecture) -> list[Rule]:
    """Return the rules of a Qwen3 model. Source: transformers `Qwen3ForCausalLM`."""
    return dense_table(arch, attention_extras=head_norm_rules(arch))
