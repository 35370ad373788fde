"""Finds contradicting keys in a config.json, and options that some programs apply and Megatron does not.

Rotary keys are checked in `rope`, and tensors against config.json in `hf_folder`. Invariant: transformers, SGLang and
this project read a config.json that passes in the same way. The following contradictions are harmless and allowed:

- sliding_window and max_window_layers while use_sliding_window is false (every Qwen2.5 folder has them);
- attention_bias of qwen2, whose q, k and v always have a bias; max_window_layers without use_sliding_window;
- attention_dropout (no dropout in training or scoring), pretraining_tp, use_cache, initializer_range;
- dtype against the dtype of the tensors, and several dtypes in one folder: trainer and server both round to the
  configured dtype (student.dtype, teacher.dtype);
- metadata.total_size of an index, which no loader compares;
- eos_token_id and bos_token_id of config.json against generation_config.json: a response ends at any of them.
"""

from __future__ import annotations

from typing import Any

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "bias": (False, None),  # llama: SGLang's other name of attention_bias
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "is_causal": (True, None),
    # Only SGLang reads these four.
    "rope_is_neox_style": (True,),  # llama
    "scale_emb": (1, 1.0),  # qwen2
    "original_num_attention_heads": (None,),  # qwen2: SGLang divides hidden_size by it
    "final_logit_softcapping": (None,),
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
    "compression_config": (None,),  # the older name of quantization_config
    "transformers_weights": (None,),  # transformers reads this file instead of model.safetensors
    "text_config": (None,),
    "llm_config": (None,),
    "language_config": (None,),
    "thinker_config": (None,),
}
"""Option -> allowed values. Any other value changes the logits in some program. The first value is the default."""


def contradictions(config: dict[str, Any], *, language_model: str, has_windows: bool) -> list[str]:
    """Return every reason why programs would read this config.json differently, with keys and values.

    `language_model` is the family's class with an output layer. `has_windows` tells whether its layers can have a
    window.
    """
    family = config["model_type"]
    return [
        *_unsupported(config, family),
        *_layer_types(config),
        *([] if has_windows else _sliding_window(config, family)),
        *_architectures(config, family, language_model),
        *_dtypes(config),
        *_types(config),
    ]


def _unsupported(config: dict[str, Any], family: str) -> list[str]:
    problems = []
    for key, allowed in _ALLOWED.items():
        if key == "attention_bias" and family == "qwen2":
            continue
        found = config.get(key, allowed[0])
        if found not in allowed:
            problems.append(f"{key} is {found!r}; supported: {allowed[0]!r}")
    return problems


def _layer_types(config: dict[str, Any]) -> list[str]:
    given = config.get("layer_types")
    if given is None:
        return []
    if not isinstance(given, list):
        return [f"layer_types is {given!r}; expected a list"]
    problems = []
    other = sorted({str(kind) for kind in given} - {"full_attention"})
    if other:
        problems.append(f"layer_types has {', '.join(other)}; supported: full_attention")
    layers = config.get("num_hidden_layers")
    if len(given) != layers:
        problems.append(f"layer_types has {len(given)} entries but num_hidden_layers is {layers!r}")
    return problems


def _sliding_window(config: dict[str, Any], family: str) -> list[str]:
    """Check a family without windows. transformers gives llama no window, but a folder made from Mistral states one.

    For families with windows, `use_sliding_window` is checked instead (`_ALLOWED`).
    """
    window, context = config.get("sliding_window"), config.get("max_position_embeddings")
    if not isinstance(window, int) or not isinstance(context, int) or window >= context:
        return []
    return [
        f"model_type is {family}, which attends to the whole context, but sliding_window is {window} with "
        f"max_position_embeddings {context}; remove sliding_window or correct model_type"
    ]


def _architectures(config: dict[str, Any], family: str, language_model: str) -> list[str]:
    """Check that both name one model: transformers reads model_type, SGLang reads architectures."""
    stated = config.get("architectures")
    if not stated or stated == [language_model]:
        return []
    return [f"model_type is {family!r} but architectures is {stated!r}; expected [{language_model!r}]"]


def _dtypes(config: dict[str, Any]) -> list[str]:
    new, old = config.get("dtype"), config.get("torch_dtype")
    if new is None or old is None or new == old:
        return []
    return [f"dtype is {new!r} and torch_dtype is {old!r}; remove the wrong one"]


def _types(config: dict[str, Any]) -> list[str]:
    """Find values of a wrong JSON type that Python would treat as true."""
    tied = config.get("tie_word_embeddings")
    if tied is None or isinstance(tied, bool):
        return []
    return [f"tie_word_embeddings is {tied!r}; expected true or false"]
