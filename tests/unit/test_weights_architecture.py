"""Reading config.json: both generations of keys, and a one-line refusal of options that would change the logits."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from tropd_mcore.errors import ModelError
from tropd_mcore.weights.architecture import (
    architecture_from_config,
    architecture_from_json,
    architecture_to_json,
    check_same_architecture,
    read_architecture,
)

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model_type": "qwen3",
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 307,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "dtype": "bfloat16",
    }
    return {key: value for key, value in (values | changes).items() if value is not ...}


def read(**changes: Any) -> Any:
    return architecture_from_config(config(**changes), source="config.json")


def test_every_field_of_config_json_is_read() -> None:
    arch = read(rope_theta=1e6)
    assert (arch.num_layers, arch.hidden_size, arch.ffn_hidden_size) == (3, 48, 80)
    assert (arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.vocab_size) == (4, 2, 16, 307)
    assert (arch.rms_norm_eps, arch.max_position_embeddings, arch.dtype) == (1e-5, 512, "bfloat16")
    assert (arch.tied_embeddings, arch.rope_theta, arch.rope_scaling) == (True, 1e6, None)


@pytest.mark.parametrize(
    ("family", "qk_norm", "qkv_bias"), [("qwen3", True, False), ("qwen2", False, True), ("llama", False, False)]
)
def test_the_model_family_decides_head_norms_and_biases(family: str, qk_norm: bool, qkv_bias: bool) -> None:
    arch = read(model_type=family)
    assert (arch.family, arch.qk_norm, arch.qkv_bias) == (family, qk_norm, qkv_bias)


def test_absent_head_dim_and_kv_heads_are_those_that_transformers_takes() -> None:
    arch = read(model_type="llama", head_dim=..., num_key_value_heads=...)
    assert (arch.head_dim, arch.num_kv_heads) == (12, 4)
    assert read(model_type="qwen2", head_dim=...).head_dim == 12
    assert read(head_dim=..., num_key_value_heads=None).num_kv_heads == 4
    assert read(head_dim=...).head_dim == Qwen3Config().head_dim == 128
    with pytest.raises(ModelError, match="num_key_value_heads is None"):  # transformers would take 32
        read(num_key_value_heads=...)


def test_both_generations_of_rope_keys_give_the_same_architecture() -> None:
    new = read(model_type="llama", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    old = read(model_type="llama", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    older = read(model_type="llama", rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    assert new == old == older
    assert new.rope_theta == 5e5
    assert new.rope_scaling == {"rope_type": "llama3", **LLAMA3}


@pytest.mark.parametrize("keys", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_plain_rope_has_no_scaling_and_the_default_base(keys: dict[str, Any]) -> None:
    arch = read(**keys)
    assert (arch.rope_theta, arch.rope_scaling) == (10000.0, None)


def test_the_dtype_key_of_older_releases_is_read() -> None:
    assert read(dtype=..., torch_dtype="float32").dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mixtral"}, ["mixtral", "llama, qwen2, qwen3"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"model_type": "llama", "mlp_bias": True}, ["mlp_bias"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, ["rope_type", "longrope", "llama3, yarn"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, ["rope_type", "dynamic", "llama3, yarn"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'", "original_max_position_embeddings"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["linear", "factor"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "high_freq_factor"]),
        ({"rope_theta": -1.0}, ["rope_theta"]),
        ({"num_hidden_layers": ...}, ["num_hidden_layers", "positive integer"]),
        ({"vocab_size": "many"}, ["vocab_size", "many"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"dtype": "int8"}, ["dtype", "int8"]),
    ],
)
def test_options_that_are_not_reproduced_are_refused_in_one_line(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        read(**changes)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in ["config.json", *words]), message


def test_missing_folder_missing_file_and_broken_json_have_different_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not found; expected a directory"):
        read_architecture(tmp_path / "absent")
    with pytest.raises(ModelError, match="config.json not found"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="not valid JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ModelError, match="expected a JSON object"):
        read_architecture(tmp_path)


def test_the_json_round_trip_of_an_architecture_keeps_every_field() -> None:
    arch = read(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4})
    values = json.loads(json.dumps(architecture_to_json(arch)))
    assert architecture_from_json(values, source="x") == arch
    with pytest.raises(ModelError, match="unknown fields \\['depth'\\]"):
        architecture_from_json(values | {"depth": 1}, source="x")


def test_a_different_architecture_is_refused_with_both_values_but_the_dtype_may_differ() -> None:
    arch = read()
    check_same_architecture(read(dtype="float32", max_position_embeddings=1024), arch, source="x")
    with pytest.raises(ModelError, match="num_layers is 5, expected 3"):
        check_same_architecture(read(num_hidden_layers=5), arch, source="x")
