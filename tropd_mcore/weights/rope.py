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
}
"""Supported rope_type -> parameters that it needs."""
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
    known = {"type", "rope_type", "rope_theta", "partial_rotary_factor", *needed, *_WITHOUT_EFFECT.get(kind, ())}
    unknown = sorted(name for name, value in values.items() if name not in known and value is not None)
    if unknown:
        raise ModelError(
            f"{source}: {key} has {', '.join(f'{name}={values[name]!r}' for name in unknown)}, which has no effect on "
            f"rope_type {kind!r}; correct rope_type or remove it"
        )
    scaling = {name: merged[name] for name in needed}
    return float(theta), {"rope_type": kind, **scaling} if needed else None


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
