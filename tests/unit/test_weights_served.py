"""The sizes of a served model, read from every layout of config.json that SGLang knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import write_moe_teacher, write_tiny_model
from tropd_mcore.errors import ModelError
from tropd_mcore.weights.architecture import read_architecture
from tropd_mcore.weights.served import ServedModel, read_served_model, read_vocab_size

SIZES = {"vocab_size": 307, "max_position_embeddings": 512}


def write(folder: Path, config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_that_megatron_builds_has_the_same_sizes_in_both_readings(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", num_hidden_layers=1)
    arch, served = read_architecture(folder), read_served_model(folder)
    assert served == ServedModel(arch.family, arch.vocab_size, arch.max_position_embeddings)


def test_a_mixture_of_experts_made_for_a_student_has_its_tokens(tmp_path: Path) -> None:
    student = write_tiny_model(tmp_path / "student", num_hidden_layers=1, vocab_size=320)
    teacher = write_moe_teacher(tmp_path / "teacher", student, max_position_embeddings=700)
    assert read_served_model(teacher) == ServedModel("qwen3_moe", 320, 700)
    assert (teacher / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        {**SIZES},
        {"text_config": SIZES},
        {"text_config": SIZES, "vocab_size": 9, "max_position_embeddings": 9},
        {"llm_config": SIZES, "text_config": {"vocab_size": 9}},
        {"thinker_config": {"text_config": SIZES, "audio_config": {"vocab_size": 9}}, "vocab_size": 9},
        {"text_config": {"max_position_embeddings": 512}, "vocab_size": 307},
        {"vocab_size": 307, "seq_length": 512, "max_position_embeddings": 9},
        {**SIZES, "text_config": None},
    ],
    ids=str,
)
def test_the_sizes_are_those_of_the_language_model(tmp_path: Path, config: dict[str, Any]) -> None:
    assert read_served_model(write(tmp_path, {"model_type": "any", **config})) == ServedModel("any", 307, 512)
    assert read_vocab_size(tmp_path) == 307


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"vocab_size": 307}, "max_position_embeddings is None; expected a positive integer, its context length"),
        ({**SIZES, "seq_length": "4k"}, "seq_length is '4k'; expected a positive integer, its context length"),
        ({"text_config": {"max_position_embeddings": 512}}, "vocab_size is None; expected a positive integer"),
        ({**SIZES, "vocab_size": True}, "vocab_size is True; expected a positive integer"),
        ({**SIZES, "vocab_size": -1}, "vocab_size is -1; expected a positive integer"),
        ({**SIZES, "model_type": None}, "model_type is None; expected the name of an architecture"),
        ([1], "expected a JSON object, found list"),
    ],
    ids=str,
)
def test_a_missing_or_senseless_size_is_one_line_with_its_name(tmp_path: Path, config: Any, words: str) -> None:
    write(tmp_path, {"model_type": "any", **config} if isinstance(config, dict) else config)
    with pytest.raises(ModelError) as caught:
        read_served_model(tmp_path)
    assert words in str(caught.value) and "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_config_json_is_named(tmp_path: Path) -> None:
    for folder, words in ((tmp_path, "config.json not found"), (tmp_path / "absent", "not found")):
        with pytest.raises(ModelError, match=words):
            read_served_model(folder)
