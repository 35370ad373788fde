"""Lists the weight rules of each model family, and checks that no tensor is left over on either side.

This module does not define what a rule does (`mapping`). Invariant: the order of `rules`, and therefore of an export,
is the order of a Hugging Face file: embedding, layers from first to last, final norm, output layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tropd_mcore.errors import ModelError
from tropd_mcore.weights import llama, qwen2, qwen3
from tropd_mcore.weights.architecture import Architecture
from tropd_mcore.weights.dense import OUTPUT
from tropd_mcore.weights.mapping import Rule

TABLES: dict[str, Callable[[Architecture], list[Rule]]] = {
    "qwen3": qwen3.table,
    "qwen2": qwen2.table,
    "llama": llama.table,
}
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"
"""Old files store the rotary frequencies, although config.json determines them."""
_LISTED = 6


def rules(arch: Architecture) -> list[Rule]:
    """Return one rule per parameter of the model, with separate rules for each layer."""
    table = TABLES[arch.family](arch)
    first = next(index for index, rule in enumerate(table) if rule.per_layer)
    last = len(table) - next(index for index, rule in enumerate(reversed(table)) if rule.per_layer)
    layers = [rule.at_layer(layer) for layer in range(arch.num_layers) for rule in table[first:last]]
    return [*table[:first], *layers, *table[last:]]


def hf_weight_plan(arch: Architecture) -> list[tuple[str, tuple[int, ...]]]:
    """Return (name, shape) of every tensor of the model's Hugging Face folder, in the order of an export."""
    return [
        (name, shape)
        for rule in rules(arch)
        if rule.exported
        for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
    ]


def rule_by_mcore_name(arch: Architecture) -> dict[str, Rule]:
    """Return {parameter name: rule} for the names of both layer specs, with layers numbered over the whole model."""
    return {name: rule for rule in rules(arch) for name in rule.mcore_names}


def check_hf_names(found: Iterable[str], arch: Architecture, *, source: str) -> None:
    """Raise ModelError that names the differences if a folder's tensors do not match the architecture.

    Stored rotary frequencies are ignored. So is a stored output layer of a tied model, which `mcore.weights_io`
    compares with the embedding.
    """
    expected = {name for name, _ in hf_weight_plan(arch)}
    names = {name for name in found if not is_derived(name)}
    if arch.tied_embeddings:
        names.discard(OUTPUT)
    missing, unknown = sorted(expected - names), sorted(names - expected)
    if missing or unknown:
        parts = [
            f"{len(group)} {what} ({listed(group)})"
            for what, group in (("missing", missing), ("unknown", unknown))
            if group
        ]
        raise ModelError(f"{source}: tensors do not fit a {arch.family} model: {', '.join(parts)}")


def check_mcore_names(found: Iterable[str], arch: Architecture, *, source: str) -> None:
    """Raise ModelError if a Megatron model, over all stages, has a parameter without a rule or a rule without one.

    The output layer of a tied model may be absent. It exists only on a last stage that is not also the first stage.
    """
    names = set(found)
    unknown = sorted(names - set(rule_by_mcore_name(arch)))
    missing = sorted(
        " or ".join(rule.mcore_names)
        for rule in rules(arch)
        if rule.exported and not names.intersection(rule.mcore_names)
    )
    if missing or unknown:
        parts = [
            f"{len(group)} {what} ({listed(group)})"
            for what, group in (("without a parameter", missing), ("without a rule", unknown))
            if group
        ]
        raise ModelError(f"{source}: parameters do not fit a {arch.family} model: {', '.join(parts)}")


def is_derived(name: str) -> bool:
    """Return whether a stored tensor is not a weight, because config.json determines it."""
    return name.endswith(_DERIVED_SUFFIX)


def listed(names: list[str]) -> str:
    """Return the first names as text, and how many more there are."""
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
