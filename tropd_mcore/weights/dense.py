"""Rules for the parameters that all supported dense decoders share, in the order of a Hugging Face file.

Parameters that only one family has are in `qwen3`, `qwen2` and `llama`. Invariant: the names of both Megatron layer
specs lead to the same rule. In the Transformer Engine spec a norm is part of the linear layer that follows it.
"""

from __future__ import annotations

from tropd_mcore.weights.architecture import Architecture
from tropd_mcore.weights.mapping import Rule, Split

LAYER = "decoder.layers.{i}."
HF_LAYER = "model.layers.{i}."
EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"


def dense_table(arch: Architecture, *, attention_extras: list[Rule]) -> list[Rule]:
    """Return the rules of a dense decoder; `attention_extras` come after the QKV projection of each layer."""
    hidden, heads = arch.hidden_size, arch.num_heads * arch.head_dim
    return [
        Rule(("embedding.word_embeddings.weight",), (EMBEDDING,), ((arch.vocab_size, hidden),), Split.VOCAB),
        Rule(
            (LAYER + "input_layernorm.weight", LAYER + "self_attention.linear_qkv.layer_norm_weight"),
            (HF_LAYER + "input_layernorm.weight",),
            ((hidden,),),
            Split.REPLICATED,
        ),
        qkv_rule(arch, "weight"),
        *attention_extras,
        Rule(
            (LAYER + "self_attention.linear_proj.weight",),
            (HF_LAYER + "self_attn.o_proj.weight",),
            ((hidden, heads),),
            Split.ROW,
        ),
        *_mlp_rules(arch),
        Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",), ((hidden,),), Split.REPLICATED),
        Rule(
            ("output_layer.weight",),
            (EMBEDDING if arch.tied_embeddings else OUTPUT,),
            ((arch.vocab_size, hidden),),
            Split.VOCAB,
            exported=not arch.tied_embeddings,
        ),
    ]


def qkv_rule(arch: Architecture, kind: str) -> Rule:
    """Return the rule of the joint query, key and value projection; `kind` is weight or bias."""
    rows = (arch.num_heads * arch.head_dim, *(arch.num_kv_heads * arch.head_dim,) * 2)
    columns = (arch.hidden_size,) if kind == "weight" else ()
    return Rule(
        (LAYER + f"self_attention.linear_qkv.{kind}",),
        tuple(HF_LAYER + f"self_attn.{part}_proj.{kind}" for part in ("q", "k", "v")),
        tuple((count, *columns) for count in rows),
        Split.QKV,
    )


def head_norm_rules(arch: Architecture) -> list[Rule]:
    """Return the rules of the RMSNorm on each query and key head."""
    return [
        Rule(
            (LAYER + f"self_attention.{part}_layernorm.weight",),
            (HF_LAYER + f"self_attn.{part}_norm.weight",),
            ((arch.head_dim,),),
            Split.REPLICATED,
        )
        for part in ("q", "k")
    ]


def _mlp_rules(arch: Architecture) -> list[Rule]:
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    return [
        Rule(
            (LAYER + "pre_mlp_layernorm.weight", LAYER + "mlp.linear_fc1.layer_norm_weight"),
            (HF_LAYER + "post_attention_layernorm.weight",),
            ((hidden,),),
            Split.REPLICATED,
        ),
        Rule(
            (LAYER + "mlp.linear_fc1.weight",),
            (HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"),
            ((ffn, hidden), (ffn, hidden)),
            Split.GATE_UP,
        ),
        Rule(
            (LAYER + "mlp.linear_fc2.weight",),
            (HF_LAYER + "mlp.down_proj.weight",),
            ((hidden, ffn),),
            Split.ROW,
        ),
    ]
