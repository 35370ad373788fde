"""Model folders with contradictory settings: refused with both, or read as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.tiny_models import write_tiny_model
from tropd_mcore.errors import ModelError
from tropd_mcore.mcore.conversion import hf_to_mcore
from tropd_mcore.weights.architecture import architecture_from_config, read_architecture
from tropd_mcore.weights.hf_folder import HfReader, write_hf_folder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
SIZES = {
    "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 307, "max_position_embeddings": 512,
}  # fmt: skip


def read(family: str = "qwen3", **changes: Any) -> Any:
    return architecture_from_config({"model_type": family, **SIZES, **changes}, source="config.json")


def read_by_transformers(family: str = "qwen3", **changes: Any) -> tuple[str, float]:
    """(kind, base) of the rotary embeddings."""
    found = AutoConfig.for_model(family, **json.loads(json.dumps({**SIZES, **changes}))).rope_parameters
    return found["rope_type"], found["rope_theta"]


REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    # rotary keys
    ("qwen3", {"rope_parameters": PLAIN, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
     ["rope_scaling", "'linear'", "rope_parameters", "1000000.0", "remove rope_scaling"]),
    ("qwen3", {"rope_parameters": PLAIN, "rope_scaling": YARN}, ["rope_scaling", "'yarn'", "rope_parameters"]),
    ("qwen3", {"rope_parameters": PLAIN, "rope_scaling": {"rope_type": "default"}},  # transformers: base 10000
     ["rope_scaling", "rope_parameters", "1000000.0"]),
    ("llama", {"rope_parameters": LLAMA3, "rope_scaling": {**LLAMA3, "factor": 32.0}}, ["32.0", "8.0"]),
    ("qwen3", {"rope_parameters": PLAIN, "rope_theta": 1e4}, ["rope_theta", "10000.0", "1000000.0", "rope_parameters"]),
    ("qwen3", {"rope_scaling": {**PLAIN, "rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
     ["rope_theta", "500000.0", "1000000.0", "rope_scaling"]),
    ("qwen3", {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 4.0}}, ["type 'yarn'", "'linear'"]),
    ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 4.0},
               "rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 4.0}}, ["rope_scaling", "'yarn'"]),
    ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096},
     ["original_max_position_embeddings", "4096", "8192"]),
    ("qwen3", {"rope_parameters": {"full_attention": PLAIN}}, ["rope_parameters", "layer type", "full_attention"]),
    ("qwen3", {"rope_scaling": {"factor": 4.0}}, ["rope_scaling", "factor=4.0", "'default'"]),
    ("qwen3", {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]}}, ["mrope_section"]),
    ("llama", {"rope_scaling": {**LLAMA3, "beta_fast": 32.0}}, ["beta_fast=32.0", "llama3"]),
    ("qwen3", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
    ("qwen3", {"rope_parameters": PLAIN, "partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ("qwen3", {"rope_scaling": "linear"}, ["rope_scaling", "'linear'", "object"]),
    ("qwen3", {"rope_theta": True}, ["rope_theta", "True"]),
    ("qwen3", {"rope_theta": float("nan")}, ["rope_theta", "nan"]),
    ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, ["linear", "factor"]),
    # layers and windows
    ("qwen3", {"layer_types": ["full_attention"] * 4}, ["layer_types has 4", "num_hidden_layers is 3"]),
    ("qwen3", {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, ["sliding_attention"]),
    ("qwen3", {"layer_types": "full_attention"}, ["layer_types", "a list"]),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 3}, ["use_sliding_window"]),
    ("llama", {"sliding_window": 128}, ["llama", "sliding_window is 128", "max_position_embeddings 512"]),
    ("qwen3", {"per_layer_config": {"1": {"num_attention_heads": 8}}}, ["per_layer_config"]),
    ("qwen2", {"is_causal": False}, ["is_causal"]),
    # which class reads it
    ("llama", {"architectures": ["Qwen2ForCausalLM"]}, ["model_type is 'llama'", "Qwen2ForCausalLM", "expected"]),
    ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, ["Qwen3ForSequenceClassification"]),
    ("qwen3", {"text_config": {"vocab_size": 99}}, ["text_config"]),
    ("qwen3", {"llm_config": {"vocab_size": 99}}, ["llm_config"]),
    ("qwen3", {"transformers_weights": "other.safetensors"}, ["transformers_weights", "other.safetensors"]),
    ("llama", {"rope_is_neox_style": False}, ["rope_is_neox_style is False"]),
    ("qwen2", {"scale_emb": 12}, ["scale_emb is 12"]),
    ("qwen2", {"original_num_attention_heads": 2}, ["original_num_attention_heads is 2"]),
    ("qwen3", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping is 30.0"]),
    # numbers
    ("qwen3", {"dtype": "float32", "torch_dtype": "bfloat16"}, ["dtype is 'float32'", "torch_dtype is 'bfloat16'"]),
    ("qwen3", {"compression_config": {"format": "int-quantized"}}, ["compression_config"]),
    ("llama", {"bias": True}, ["bias"]),
    ("llama", {"attention_bias": True}, ["attention_bias"]),
    ("qwen3", {"tie_word_embeddings": "false"}, ["tie_word_embeddings", "'false'"]),
    ("qwen3", {"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_contradictory_keys_are_refused_and_both_named(family: str, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        read(family, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_all_contradictions_of_a_model_folder_are_named_at_once() -> None:
    with pytest.raises(ModelError) as caught:
        read(layer_types=["full_attention"], dtype="float32", torch_dtype="float16", is_causal=False)
    assert all(word in str(caught.value) for word in ("layer_types", "torch_dtype", "is_causal"))


HARMLESS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"rope_parameters": PLAIN, "rope_scaling": None}),
    ("qwen3", {"rope_parameters": PLAIN, "rope_scaling": {}}),
    ("qwen3", {"rope_parameters": PLAIN, "rope_theta": 1e6}),
    ("qwen3", {"rope_parameters": PLAIN, "rope_scaling": dict(PLAIN)}),
    ("qwen3", {"rope_parameters": PLAIN, "rope_scaling": {"type": "default", "rope_theta": 1e6}}),
    ("qwen3", {"rope_parameters": {}, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e6}),
    ("qwen3", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6}),
    ("qwen3", {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}),
    ("llama", {"rope_scaling": {k: v for k, v in LLAMA3.items() if k[:4] != "orig"}, "rope_theta": 5e5,
               "original_max_position_embeddings": 8192}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 128, "max_window_layers": 2}),
    ("qwen2", {"attention_bias": False}),
    ("llama", {"sliding_window": 4096}),
    ("llama", {"attention_dropout": 0.1, "pretraining_tp": 2}),
    ("qwen3", {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"] * 3}),
    ("qwen3", {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), HARMLESS, ids=lambda value: str(value)[:60])
def test_keys_that_agree_or_are_unused_are_read_as_transformers_reads_them(
    family: str, changes: dict[str, Any]
) -> None:
    arch = read(family, **changes)
    kind = (arch.rope_scaling or {"rope_type": "default"})["rope_type"]
    assert (kind, arch.rope_theta) == read_by_transformers(family, **changes)


def test_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", with_tokenizer=False)
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{ "vocab_size": 306,', 1))
    refused(lambda: read_architecture(folder), "config.json", "vocab_size", "306 and 307")


def refused(action: Callable[[], object], *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def check(folder: Path) -> None:
    with HfReader(folder) as reader:
        reader.check()


def test_a_conversion_refuses_what_a_training_job_refuses(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", with_tokenizer=False)
    change_config(folder, rope_scaling={"rope_type": "linear", "factor": 4.0})
    nobody: Any = None  # refused before anything is built
    refused(lambda: hf_to_mcore(folder, tmp_path / "out", nobody), "rope_scaling", "rope_parameters")
    assert not (tmp_path / "out").exists()


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 306}, ["model.embed_tokens.weight", "(307, 48)", "(306, 48)"]),
        ({"num_hidden_layers": 3, "layer_types": None}, ["unknown", "model.layers.3."]),
        ({"num_hidden_layers": 5, "layer_types": None}, ["missing", "model.layers.4."]),
        ({"head_dim": 8}, ["self_attn.q_proj.weight", "(64, 48)", "(32, 48)"]),
        ({"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 4}, ["q_norm", "(16,)", "(8,)"]),
        ({"model_type": "llama", "architectures": None, "layer_types": None}, ["unknown", "q_norm"]),
        ({"tie_word_embeddings": False}, ["missing", "lm_head.weight"]),
    ],
    ids=str,
)
def test_a_config_json_that_contradicts_the_tensors_is_refused(
    changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "m", tied=True, with_tokenizer=False)
    check(folder)
    change_config(folder, **changes)
    refused(lambda: check(folder), *words)


def test_tensors_of_several_plain_dtypes_are_read_and_narrower_ones_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", with_tokenizer=False)
    path = folder / SINGLE
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    check(folder)
    narrow = {**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}
    save_file(narrow, path, metadata={"format": "pt"})
    refused(lambda: check(folder), "model.norm.weight", "F8_E4M3", "quantization_config")
    save_file(tensors, path, metadata={"format": "flax"})
    refused(lambda: check(folder), SINGLE, "flax", "pt")


def test_weight_files_that_different_loaders_would_choose_differently_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", max_shard_size="100KB", with_tokenizer=False)
    check(folder)
    other = write_tiny_model(tmp_path / "other", seed=1, with_tokenizer=False)
    (folder / SINGLE).write_bytes((other / SINGLE).read_bytes())
    refused(lambda: check(folder), SINGLE, "transformers reads", INDEX, "SGLang")
    check(other)
    (other / "consolidated.safetensors").write_bytes(b"of another format")
    check(other)
    (other / "model-00001-of-00002.safetensors").write_bytes(b"of a download that was broken off")
    refused(lambda: check(other), "model-00001-of-00002.safetensors", SINGLE, "SGLang")


@pytest.mark.parametrize("file", ["adapter_config.json", "hf_quant_config.json"])
def test_a_folder_that_other_programs_would_read_as_another_kind_of_model_is_refused(file: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", with_tokenizer=False)
    (folder / file).write_text("{}")
    refused(lambda: check(folder), file, "first")


def test_a_stale_tensor_in_a_shard_is_refused_but_stored_rotary_frequencies_are_accepted(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", max_shard_size="100KB", with_tokenizer=False)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    held, others = load_file(first), load_file(second)
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(held | derived, first, metadata={"format": "pt"})
    check(folder)
    name = next(iter(others))
    save_file(held | {name: others[name] * 2}, first, metadata={"format": "pt"})
    refused(lambda: check(folder), first.name, name, INDEX, second.name)


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", max_shard_size="100KB", with_tokenizer=False)
    path = folder / INDEX
    path.write_text(path.read_text().replace('"weight_map": {', '"weight_map": {"model.norm.weight": "a.safetensors",'))
    refused(lambda: check(folder), INDEX, "model.norm.weight", "2 times")


def test_an_export_states_its_dtype_under_both_keys_if_its_source_has_both(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", with_tokenizer=False)
    change_config(source, torch_dtype="float32")
    with HfReader(source) as reader:
        narrow = [(name, reader.tensor(name).bfloat16()) for name in reader.names()]
    write_hf_folder(tmp_path / "out", narrow, source_folder=source)
    assert read_architecture(tmp_path / "out").dtype == "bfloat16"
