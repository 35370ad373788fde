"""Reads the few sizes of a config.json that matter for a model behind a server, whatever its architecture.

Megatron never builds such a model, so nothing here asks whether it could (`architecture` does). Invariant: vocabulary
and context are those that SGLang reads, also if the language model is nested in the file of a multimodal model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropd_mcore.errors import ModelError
from tropd_mcore.weights.architecture import read_config_json

TEXT_SECTIONS = ("thinker_config", "llm_config", "language_config", "text_config")
"""Sections of config.json that hold the language model of a multimodal model; the first one found counts. Source:
SGLang `get_hf_text_config`."""
CONTEXT_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
"""Keys that state the context length in tokens; the first one found counts. Source: SGLang `CONTEXT_LENGTH_KEYS`."""


@dataclass(frozen=True)
class ServedModel:
    """A model that only a server loads."""

    family: str
    """`model_type` of config.json."""
    vocab_size: int
    """Rows of its embedding, with the padding of the tokenizer."""
    max_position_embeddings: int
    """Context length in tokens."""


def read_served_model(folder: Path) -> ServedModel:
    """Read the sizes of the language model in `folder`. Raises ModelError that names a missing or senseless one."""
    config, path = read_config_json(folder), Path(folder) / "config.json"
    text = text_settings(config)
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise ModelError(f"{path}: model_type is {family!r}; expected the name of an architecture")
    key = next((key for key in CONTEXT_KEYS if text.get(key) is not None), "max_position_embeddings")
    return ServedModel(
        family=family,
        vocab_size=_size(text, "vocab_size", path, "the number of rows of its embedding"),
        max_position_embeddings=_size(text, key, path, "its context length in tokens"),
    )


def read_vocab_size(folder: Path) -> int:
    """Return the rows of the embedding of the model in `folder`. Raises ModelError."""
    path = Path(folder) / "config.json"
    return _size(text_settings(read_config_json(folder)), "vocab_size", path, "the number of rows of its embedding")


def text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the language model: those of its section, completed with the ones around it."""
    for name in TEXT_SECTIONS:
        section = config.get(name)
        if isinstance(section, dict):
            around = {key: value for key, value in config.items() if key not in TEXT_SECTIONS}
            return text_settings({**around, **section})
    return config


def _size(text: dict[str, Any], key: str, path: Path, meaning: str) -> int:
    value = text.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ModelError(f"{path}: {key} is {value!r}; expected a positive integer, {meaning}")
