"""Rotary positions of a config.json, of either generation of keys, read only where every program reads them alike.

transformers 5 writes `rope_parameters`, older releases `rope_theta` and `rope_scaling`. transformers 5 lets a
`rope_scaling` replace the whole of `rope_parameters`, its `rope_theta` included; servers and other releases read one or
the other. Invariant: a value that stands in two places is the same in both, and every key is one that has an effect on
the kind of rotation it stands beside.
"""

from __future__ import annotations

import math
from typing import Any

from tropd_mcore.errors import ModelError

DEFAULT_THETA = 10000.0
"""Base where no key states one. Source: transformers 5."""
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""What each supported kind needs."""
_WITHOUT_EFFECT = {"linear": ("original_max_position_embeddings",)}
"""Accepted beside it: no program reads it there."""
_TWO_PLACES = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Keys that may stand at the top level of config.json and among the rotary parameters."""


def read_rope(config: dict[str, Any], source: str) -> tuple[float, dict[str, Any] | None]:
    """(base, `rope_type` and its parameters or None for plain rotary embeddings); `source` names the file in errors.

    Raises ModelError for a kind that is not supported, a parameter that is missing or unknown, and for two keys that
    say different things.
    """
    given = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)}  # empty says nothing
    for key, values in given.items():
        if not isinstance(values, dict):
            raise ModelError(f"{source}: {key} is {values!r}; expected an object")
    if len(given) == 2 and _normal(config, given["rope_parameters"]) != _normal(config, given["rope_scaling"]):
        raise ModelError(
            f"{source}: rope_scaling {config['rope_scaling']} beside rope_parameters {config['rope_parameters']}: no "
            "two programs read the pair alike; write what is meant into rope_parameters, rope_theta included, and "
            "remove rope_scaling"
        )
    key, values = next(iter(given.items()), ("rope_parameters", {}))
    return _read(config, key, values, source)


def _normal(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """All that `values` would say without the other key, under one name each."""
    said = {name: value for name, value in values.items() if value is not None}
    if said.get("rope_type", said.get("type")) == said.get("type"):
        said["rope_type"] = said.pop("type", "default")
    return {"rope_theta": config.get("rope_theta", DEFAULT_THETA), **said}


def _read(config: dict[str, Any], key: str, values: dict[str, Any], source: str) -> tuple[float, dict[str, Any] | None]:
    """What `values`, found under `key`, says together with the top level of config.json."""
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
    """`rope_type`, or `type` as older releases call it."""
    old, new = values.get("type"), values.get("rope_type")
    if old is not None and new is not None and old != new:
        raise ModelError(f"{source}: {key} has rope_type {new!r} and type {old!r}; remove the wrong one")
    kind = new or old or "default"
    if kind not in _PARAMETERS:
        raise ModelError(f"{source}: rope_type is {kind!r}; supported: {', '.join(_PARAMETERS)}")
    return str(kind)


def _with_top_level(config: dict[str, Any], key: str, values: dict[str, Any], source: str) -> dict[str, Any]:
    """`values`, completed by what only the top level states."""
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
    """A finite positive number; JSON's true and NaN are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
