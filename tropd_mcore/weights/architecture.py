"""Reads a Hugging Face config.json of a dense decoder into an `Architecture`, which fixes every weight shape and name.

This module does not read weights (`hf_folder`) or build a model (`mcore.model`). Invariant: an `Architecture` describes
a model that can be reproduced exactly. An unsupported option that would change its logits is refused here, by name.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropd_mcore.config.schema import ParallelConfig
from tropd_mcore.errors import ModelError
from tropd_mcore.file_kinds import NOTHING, folder_in_the_way
from tropd_mcore.files import shown
from tropd_mcore.weights.contradictions import contradictions
from tropd_mcore.weights.json_file import read_json_object
from tropd_mcore.weights.rope import read_rope

_DTYPES = ("float32", "bfloat16", "float16")


class UnsupportedFamily(ModelError):
    """A model of another family than those that Megatron builds here."""


@dataclass(frozen=True)
class FamilyTraits:
    """Differences between the supported families. All share RMSNorm, rotary embeddings, grouped queries and SwiGLU."""

    language_model: str
    """Class with an output layer, as named in `architectures` of config.json. Source: transformers."""
    qk_norm: bool
    qkv_bias: bool
    has_windows: bool = False
    """Whether layers can attend to a window of the context; `use_sliding_window` then switches it on."""
    head_dim: int | None = None
    """Default if config.json states none; None = hidden_size / num_attention_heads. Source: transformers."""
    kv_heads_follow: bool = False
    """Whether num_key_value_heads defaults to num_attention_heads; otherwise config.json must state it."""


FAMILIES: dict[str, FamilyTraits] = {
    "qwen3": FamilyTraits("Qwen3ForCausalLM", has_windows=True, qk_norm=True, qkv_bias=False, head_dim=128),
    "qwen2": FamilyTraits("Qwen2ForCausalLM", has_windows=True, qk_norm=False, qkv_bias=True),
    "llama": FamilyTraits("LlamaForCausalLM", qk_norm=False, qkv_bias=False, kv_heads_follow=True),
}


@dataclass(frozen=True)
class Architecture:
    """A dense decoder-only model. Sizes refer to the whole model, before any sharding or padding."""

    family: str
    """`model_type` of config.json: qwen3, qwen2 or llama."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the stored embedding: with the padding of the tokenizer, without tensor-parallel padding."""
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """`rope_type` and its parameters; None for plain rotary embeddings. Never contains rope_theta."""
    rms_norm_eps: float
    tied_embeddings: bool
    """Whether the output layer is the embedding."""
    qk_norm: bool
    qkv_bias: bool
    max_position_embeddings: int
    dtype: str
    """dtype stated in config.json: float32, bfloat16 or float16."""


def read_architecture(folder: Path) -> Architecture:
    """Read <folder>/config.json.

    Reads the rotary keys of transformers 5 (`rope_parameters`) and of older releases (`rope_theta`, `rope_scaling`).
    Raises ModelError for a missing or damaged file, an unknown family (UnsupportedFamily), an option that the Megatron
    model does not reproduce, or keys that contradict each other.
    """
    return architecture_from_config(read_config_json(folder), source=str(Path(folder) / "config.json"))


def read_config_json(folder: Path) -> dict[str, Any]:
    """Return the content of <folder>/config.json. Raises ModelError if it is missing or damaged."""
    path = Path(folder) / "config.json"
    if (found := folder_in_the_way(Path(folder))) is not None:
        what = "not found" if found.what == NOTHING else str(found)
        expected = "expected a directory with config.json and *.safetensors"
        raise ModelError(f"model folder {shown(folder)}: {what}; {expected}")
    if not os.path.lexists(path):
        raise ModelError(f"model folder {shown(folder)}: config.json not found; expected a Hugging Face model folder")
    return read_json_object(path)


def is_supported(folder: Path) -> bool:
    """Return whether Megatron could build the model in `folder`."""
    try:
        read_architecture(folder)
    except ModelError:
        return False
    return True


def architecture_from_config(config: dict[str, Any], *, source: str) -> Architecture:
    """Build an Architecture from the parsed config.json; `source` names it in errors. Raises ModelError."""
    family = config.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedFamily(f"{source}: model_type is {family!r}; supported are {known} (dense)")
    traits = FAMILIES[family]
    problems = contradictions(config, language_model=traits.language_model, has_windows=traits.has_windows)
    if problems:
        raise ModelError(f"{source}: {'; '.join(problems)}")
    num_heads = _positive_int(config, "num_attention_heads", source)
    # transformers reads null as num_attention_heads in all families, but an absent key as 32 in the Qwen families.
    stated = traits.kv_heads_follow or "num_key_value_heads" in config
    num_kv_heads = _positive_int(config, "num_key_value_heads", source, default=num_heads if stated else None)
    hidden_size = _positive_int(config, "hidden_size", source)
    head_dim = _positive_int(config, "head_dim", source, default=traits.head_dim or hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{source}: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
        )
    rope_theta, rope_scaling = read_rope(config, source)
    return Architecture(
        family=family,
        num_layers=_positive_int(config, "num_hidden_layers", source),
        hidden_size=hidden_size,
        ffn_hidden_size=_positive_int(config, "intermediate_size", source),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_positive_int(config, "vocab_size", source),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=_positive_float(config, "rms_norm_eps", source, default=1e-6),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=traits.qk_norm,
        qkv_bias=traits.qkv_bias,
        max_position_embeddings=_positive_int(config, "max_position_embeddings", source),
        dtype=_dtype(config, source),
    )


def architecture_to_json(arch: Architecture) -> dict[str, Any]:
    """Return the fields of `arch` as JSON values. `architecture_from_json` is the inverse."""
    return dataclasses.asdict(arch)


def architecture_from_json(values: dict[str, Any], *, source: str) -> Architecture:
    """Rebuild an Architecture from `architecture_to_json`. Raises ModelError that names missing or unknown fields."""
    expected = {field.name for field in dataclasses.fields(Architecture)}
    missing, unknown = sorted(expected - set(values)), sorted(set(values) - expected)
    if missing or unknown:
        raise ModelError(f"{source}: architecture has missing fields {missing} and unknown fields {unknown}")
    return Architecture(**values)


def check_same_architecture(found: Architecture, expected: Architecture, *, source: str) -> None:
    """Raise ModelError that names every field in which `found` (read from `source`) differs from `expected`.

    dtype and max_position_embeddings are not compared, because they change no name or shape of a weight.
    """
    free = {"dtype", "max_position_embeddings"}
    differences = [
        f"{field.name} is {getattr(found, field.name)!r}, expected {getattr(expected, field.name)!r}"
        for field in dataclasses.fields(Architecture)
        if field.name not in free and getattr(found, field.name) != getattr(expected, field.name)
    ]
    if differences:
        raise ModelError(f"{source}: another architecture: {'; '.join(differences)}")


def cut_problems(arch: Architecture, parallel: ParallelConfig, virtual_pipeline: int | None) -> list[str]:
    """Return the sizes of `arch` that do not divide evenly; `virtual_pipeline` is None without interleaving."""
    stages = parallel.pipeline * (virtual_pipeline or 1)
    return _undivided(
        arch,
        ("num_hidden_layers", arch.num_layers, "parallel.pipeline * parallel.virtual_pipeline", stages),
        *_tensor_cuts(arch, parallel),
    )


def frozen_cut_problems(arch: Architecture, parallel: ParallelConfig, stage_layers: Sequence[int] | None) -> list[str]:
    """Return why the model cannot be cut for scoring only. Its layers need not divide over the stages.

    `stage_layers` is teacher.pipeline_layers, the number of layers of each stage; None = `layers_of_stages` decides.
    """
    problems = _undivided(arch, *_tensor_cuts(arch, parallel))
    if stage_layers is not None and sum(stage_layers) != arch.num_layers:
        problems.append(
            f"teacher.pipeline_layers = {list(stage_layers)} has {sum(stage_layers)} layers, num_hidden_layers of "
            f"{arch.family} is {arch.num_layers}"
        )
    elif arch.num_layers < parallel.pipeline:
        problems.append(
            f"num_hidden_layers = {arch.num_layers} of {arch.family} is less than parallel.pipeline = "
            f"{parallel.pipeline}, and each stage needs a layer"
        )
    return problems


def layers_of_stages(num_layers: int, stages: int) -> list[int]:
    """Return the number of layers of each stage, as even as possible. The first stages get the rest.

    The last stage has the least, because it also has the output layer.
    """
    return [num_layers // stages + (stage < num_layers % stages) for stage in range(stages)]


Cut = tuple[str, int, str, int]
"""(name of a size, its value, key of what divides it, its value)"""


def _tensor_cuts(arch: Architecture, parallel: ParallelConfig) -> list[Cut]:
    return [
        ("num_attention_heads", arch.num_heads, "parallel.tensor", parallel.tensor),
        ("num_key_value_heads", arch.num_kv_heads, "parallel.tensor", parallel.tensor),
        ("intermediate_size", arch.ffn_hidden_size, "parallel.tensor", parallel.tensor),
    ]


def _undivided(arch: Architecture, *cuts: Cut) -> list[str]:
    return [
        f"{what} = {size} of {arch.family} is not divisible by {key} = {by}"
        for what, size, key, by in cuts
        if size % by != 0
    ]


def _dtype(config: dict[str, Any], source: str) -> str:
    found = config.get("dtype") or config.get("torch_dtype") or "float32"
    if found not in _DTYPES:
        raise ModelError(f"{source}: dtype is {found!r}; supported: {', '.join(_DTYPES)}")
    return str(found)


def _positive_int(config: dict[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"{source}: {key} is {config.get(key)!r}; expected a positive integer")
    return value


def _positive_float(config: dict[str, Any], key: str, source: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(f"{source}: {key} is {value!r}; expected a positive number")
    return float(value)
