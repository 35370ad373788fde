"""What a Hugging Face config.json says of a dense decoder, as one value that decides every weight shape and name.

Not for weights (`hf_folder`) or for building a model (`mcore.model`). Invariant: an `Architecture` describes a model
that can be reproduced exactly; whatever would change its logits and is not supported is refused here, by name.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropd_mcore.errors import ModelError

_DTYPES = ("float32", "bfloat16", "float16")
_ROPE_TYPES = ("default", "linear", "llama3")
_DEFAULT_ROPE_THETA = 10000.0


@dataclass(frozen=True)
class FamilyTraits:
    """What distinguishes the supported families; all share RMSNorm, rotary embeddings, grouped queries and SwiGLU."""

    qk_norm: bool
    qkv_bias: bool


FAMILIES: dict[str, FamilyTraits] = {
    "qwen3": FamilyTraits(qk_norm=True, qkv_bias=False),
    "qwen2": FamilyTraits(qk_norm=False, qkv_bias=True),
    "llama": FamilyTraits(qk_norm=False, qkv_bias=False),
}


@dataclass(frozen=True)
class Architecture:
    """A dense decoder-only model. Sizes are of the whole model, before any sharding or padding."""

    family: str
    """`model_type` of config.json: qwen3, qwen2 or llama."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding as stored, tokenizer padding included, tensor-parallel padding not."""
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """`rope_type` and its parameters; None for plain rotary embeddings. Never holds rope_theta."""
    rms_norm_eps: float
    tied_embeddings: bool
    """The output layer is the embedding."""
    qk_norm: bool
    qkv_bias: bool
    max_position_embeddings: int
    dtype: str
    """dtype that config.json states: float32, bfloat16 or float16."""


def read_architecture(folder: Path) -> Architecture:
    """Read <folder>/config.json.

    Understands the rotary keys of transformers 5 (`rope_parameters`) and of older releases (`rope_theta`,
    `rope_scaling`). Raises ModelError for a missing or damaged file, an unknown family, or an option that the
    Megatron model does not reproduce.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise ModelError(f"model folder {folder}: not found; expected a directory with config.json and *.safetensors")
    if not path.is_file():
        raise ModelError(f"model folder {folder}: config.json not found; expected a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return architecture_from_config(config, source=str(path))


def architecture_from_config(config: dict[str, Any], *, source: str) -> Architecture:
    """Build an Architecture from the parsed config.json; `source` names it in errors. Raises ModelError."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"{source}: model_type is {family!r}; supported are {', '.join(sorted(FAMILIES))} (dense)")
    _refuse_unsupported(config, source)
    num_heads = _positive_int(config, "num_attention_heads", source)
    num_kv_heads = _positive_int(config, "num_key_value_heads", source, default=num_heads)
    hidden_size = _positive_int(config, "hidden_size", source)
    head_dim = _positive_int(config, "head_dim", source, default=hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{source}: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
        )
    rope_theta, rope_scaling = _rope(config, source)
    traits = FAMILIES[family]
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
    """The fields of `arch` as JSON values; `architecture_from_json` is the inverse."""
    return dataclasses.asdict(arch)


def architecture_from_json(values: dict[str, Any], *, source: str) -> Architecture:
    """Rebuild what `architecture_to_json` wrote. Raises ModelError naming missing or unknown fields."""
    expected = {field.name for field in dataclasses.fields(Architecture)}
    missing, unknown = sorted(expected - set(values)), sorted(set(values) - expected)
    if missing or unknown:
        raise ModelError(f"{source}: architecture has missing fields {missing} and unknown fields {unknown}")
    return Architecture(**values)


def check_same_architecture(found: Architecture, expected: Architecture, *, source: str) -> None:
    """Raise ModelError naming every field in which `found` (of `source`) differs, dtype and context length apart.

    dtype and max_position_embeddings change neither a weight's name nor its shape.
    """
    free = {"dtype", "max_position_embeddings"}
    differences = [
        f"{field.name} is {getattr(found, field.name)!r}, expected {getattr(expected, field.name)!r}"
        for field in dataclasses.fields(Architecture)
        if field.name not in free and getattr(found, field.name) != getattr(expected, field.name)
    ]
    if differences:
        raise ModelError(f"{source}: another architecture: {'; '.join(differences)}")


def _refuse_unsupported(config: dict[str, Any], source: str) -> None:
    """Options that transformers would apply and the Megatron model would not."""
    expected: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
        "partial_rotary_factor": (1.0, None),
    }
    for key, allowed in expected.items():
        if key == "attention_bias" and config["model_type"] == "qwen2":
            continue  # qwen2 has no such option: its q, k and v always have a bias
        found = config.get(key, allowed[0])
        if found not in allowed:
            raise ModelError(f"{source}: {key} is {found!r}; supported: {allowed[0]!r}")
    other_layers = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if other_layers:
        raise ModelError(f"{source}: layer_types has {', '.join(other_layers)}; supported: full_attention")


def _rope(config: dict[str, Any], source: str) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, scaling parameters or None) of either generation of keys."""
    parameters = config.get("rope_parameters")
    legacy = config.get("rope_scaling")
    scaling = dict(parameters if parameters is not None else legacy or {})
    theta = scaling.pop("rope_theta", config.get("rope_theta", _DEFAULT_ROPE_THETA))
    kind = scaling.pop("type", None)
    kind = scaling.pop("rope_type", kind) or "default"
    if not isinstance(theta, (int, float)) or theta <= 0:
        raise ModelError(f"{source}: rope_theta is {theta!r}; expected a positive number")
    if kind not in _ROPE_TYPES:
        raise ModelError(f"{source}: rope_type is {kind!r}; supported: {', '.join(_ROPE_TYPES)}")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{source}: partial_rotary_factor is {scaling['partial_rotary_factor']!r}; supported: 1.0")
    if kind == "default":
        return float(theta), None
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}[kind]
    if kind == "llama3" and "original_max_position_embeddings" not in scaling:
        needed = (*needed, "original_max_position_embeddings")
    missing = [name for name in needed if not isinstance(scaling.get(name), (int, float))]
    if missing:
        raise ModelError(f"{source}: rope_type {kind!r} needs numbers for {', '.join(missing)}")
    return float(theta), {"rope_type": kind, **scaling}


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
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"{source}: {key} is {value!r}; expected a positive number")
    return float(value)
