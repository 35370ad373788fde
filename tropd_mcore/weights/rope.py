"""Reads the rotary settings of a config.json, and refuses those that programs would read differently.

transformers 5 writes `rope_parameters`; older releases write `rope_theta` and `rope_scaling`. In transformers 5 a
`rope_scaling` replaces all of `rope_parameters`, including its `rope_theta`. Servers and other releases read only one
of the two. Invariant: a value in two places is the same in both, and every given key has an effect on its `rope_type`.
"""

from __future__ import annotations

import math
from typing import Any

from tropd_mcore.errors import ModelError

DEFAULT_THETA = 10000.0
"""Base if no key states one. Source: transformers 5."""
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Supported rope_type -> parameters that it needs."""
_YARN_OPTIONS = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")
"""Further parameters of yarn."""
_BETA_FAST, _BETA_SLOW = 32.0, 1.0
"""Rotations within the original context above which yarn keeps a frequency, and below which it divides it by the
factor. Source: arXiv 2309.00071 section 3.2 (alpha, beta); transformers and SGLang."""
_ONLY_SGLANG = ("attn_factor", "extrapolation_factor")
"""Parameters of yarn that SGLang applies and transformers does not."""
_ATTENTION_TOLERANCE = 1e-6
"""Largest relative difference of a stated attention factor from the computed one; files state it rounded."""
_WITHOUT_EFFECT = {"linear": ("original_max_position_embeddings",)}
"""rope_type -> parameters that are accepted although no program reads them for this type."""
_TWO_PLACES = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Keys that may appear at the top level of config.json and among the rotary parameters."""


def read_rope(config: dict[str, Any], source: str) -> tuple[float, dict[str, Any] | None]:
    """Return (base, scaling). `source` names the file in errors.

    The scaling holds `rope_type` and its parameters; it is None for plain rotary embeddings. Raises ModelError for an
    unsupported rope_type, a missing or unknown parameter, and keys that contradict each other.
    """
    given = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)}  # {} counts as absent
    for key, values in given.items():
        if not isinstance(values, dict):
            raise ModelError(f"{source}: {key} is {values!r}; expected an object")
    if len(given) == 2 and _normal(config, given["rope_parameters"]) != _normal(config, given["rope_scaling"]):
        raise ModelError(
            f"{source}: rope_scaling {config['rope_scaling']} beside rope_parameters {config['rope_parameters']}: "
            "programs read this pair differently; write the intended values into rope_parameters, including "
            "rope_theta, and remove rope_scaling"
        )
    key, values = next(iter(given.items()), ("rope_parameters", {}))
    return _read(config, key, values, source)


def _normal(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return everything that `values` would mean without the other key, with one name per setting."""
    said = {name: value for name, value in values.items() if value is not None}
    if said.get("rope_type", said.get("type")) == said.get("type"):
        said["rope_type"] = said.pop("type", "default")
    return {"rope_theta": config.get("rope_theta", DEFAULT_THETA), **said}


def _read(config: dict[str, Any], key: str, values: dict[str, Any], source: str) -> tuple[float, dict[str, Any] | None]:
    """Read `values`, found under `key`, together with the top level of config.json."""
    nested = [name for name, value in values.items() if isinstance(value, dict)]
    if nested:
        raise ModelError(f"{source}: {key} has parameters by layer type ({', '.join(nested)}); supported: one for all")
    kind = _kind(key, values, source)
    merged = _with_top_level(config, key, values, source)
    theta = merged.pop("rope_theta", DEFAULT_THETA)
    if not _is_positive(theta):
        raise ModelError(f"{source}: rope_theta is {theta!r}; expected a positive number")
    partial = merged.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ModelError(f"{source}: partial_rotary_factor is {partial!r}; supported: 1.0")
    needed = _PARAMETERS[kind]
    missing = [name for name in needed if not _is_positive(merged.get(name))]
    if missing:
        raise ModelError(f"{source}: rope_type {kind!r} needs positive numbers for {', '.join(missing)}")
    options = _YARN_OPTIONS if kind == "yarn" else _WITHOUT_EFFECT.get(kind, ())
    known = {"type", "rope_type", "rope_theta", "partial_rotary_factor", *needed, *options}
    if kind == "yarn" and (foreign := [name for name in _ONLY_SGLANG if merged.get(name) is not None]):
        raise ModelError(
            f"{source}: {key} has {foreign[0]}={merged[foreign[0]]!r}, which only SGLang applies; remove it"
        )
    unknown = sorted(name for name, value in values.items() if name not in known and value is not None)
    if unknown:
        raise ModelError(
            f"{source}: {key} has {', '.join(f'{name}={values[name]!r}' for name in unknown)}, which has no effect on "
            f"rope_type {kind!r}; correct rope_type or remove it"
        )
    scaling = {name: merged[name] for name in needed}
    if kind == "yarn":
        scaling = _yarn(key, merged, source)
    return float(theta), {"rope_type": kind, **scaling} if needed else None


def _yarn(key: str, merged: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the parameters of yarn with the defaults of transformers filled in, and the attention factor computed.

    The attention factor multiplies the rotated queries and keys. SGLang computes it and ignores the key.
    """

    def refuse(reason: str) -> ModelError:
        return ModelError(f"{source}: {key}, rope_type 'yarn': {reason}")

    for name in _YARN_OPTIONS:
        value = merged.get(name)
        if value is None:
            continue
        if name == "truncate":
            if not isinstance(value, bool):
                raise refuse(f"truncate is {value!r}; expected true or false")
        elif not _is_positive(value):
            raise refuse(f"{name} is {value!r}; expected a positive number")
    factor, mscale, all_dim = merged["factor"], merged.get("mscale"), merged.get("mscale_all_dim")
    fast, slow = float(merged.get("beta_fast") or _BETA_FAST), float(merged.get("beta_slow") or _BETA_SLOW)
    if factor < 1:
        raise refuse(f"factor is {factor!r}; expected a number >= 1")
    if fast <= slow:
        raise refuse(f"beta_fast is {fast:g} and beta_slow is {slow:g}; expected beta_fast > beta_slow")
    if (mscale is None) != (all_dim is None):
        alone = "mscale_all_dim" if mscale is None else "mscale"
        raise refuse(
            f"{alone} has no effect without the other of mscale and mscale_all_dim; remove it or add the other"
        )
    growth = 0.1 * math.log(factor)
    attention = growth + 1.0 if mscale is None else (growth * mscale + 1.0) / (growth * float(all_dim or 0.0) + 1.0)
    stated = merged.get("attention_factor")
    if stated is not None and not math.isclose(stated, attention, rel_tol=_ATTENTION_TOLERANCE):
        raise refuse(
            f"attention_factor is {stated!r}, but SGLang ignores that key and computes {attention:.6f} from factor, "
            "mscale and mscale_all_dim; remove it, or use the values that give it"
        )
    return {
        "factor": float(factor),
        "original_max_position_embeddings": merged["original_max_position_embeddings"],
        "beta_fast": fast,
        "beta_slow": slow,
        "attention_factor": attention if stated is None else float(stated),
        "truncate": merged.get("truncate") is not False,
    }


def _kind(key: str, values: dict[str, Any], source: str) -> str:
    """Return `rope_type`, which older releases call `type`."""
    old, new = values.get("type"), values.get("rope_type")
    if old is not None and new is not None and old != new:
        raise ModelError(f"{source}: {key} has rope_type {new!r} and type {old!r}; remove the wrong one")
    kind = new or old or "default"
    if kind not in _PARAMETERS:
        raise ModelError(f"{source}: rope_type is {kind!r}; supported: {', '.join(_PARAMETERS)}")
    return str(kind)


def _with_top_level(config: dict[str, Any], key: str, values: dict[str, Any], source: str) -> dict[str, Any]:
    """Return `values`, completed with settings that only the top level states."""
    merged = {name: value for name, value in values.items() if value is not None}
    for name in _TWO_PLACES:
        above = config.get(name)
        if above is None:
            continue
        if merged.setdefault(name, above) != above:
            raise ModelError(
                f"{source}: {name} is {above!r} at the top level and {merged[name]!r} in {key}; remove the wrong one"
            )
    return merged


def _is_positive(value: Any) -> bool:
    """Return whether `value` is a finite positive number. JSON's true and NaN are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
