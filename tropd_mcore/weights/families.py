"""The rules of a model by family, and the checks that nothing is left over on either side.

Not for what a rule does (`mapping`). Invariant: the order of `rules`, and so of an export, is that of a Hugging Face
file: embedding, layers from the first to the last, final norm, output layer.
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
"""Old files store the rotary frequencies; they follow from config.json."""
_LISTED = 6


def rules(arch: Architecture) -> list[Rule]:
    """Every parameter of the model, layers written out."""
    table = TABLES[arch.family](arch)
    first = next(index for index, rule in enumerate(table) if rule.per_layer)
    last = len(table) - next(index for index, rule in enumerate(reversed(table)) if rule.per_layer)
    layers = [rule.at_layer(layer) for layer in range(arch.num_layers) for rule in table[first:last]]
    return [*table[:first], *layers, *table[last:]]


def hf_weight_plan(arch: Architecture) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of the model's Hugging Face folder, in the order of an export."""
    return [
        (name, shape)
        for rule in rules(arch)
        if rule.exported
        for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
    ]


def rule_by_mcore_name(arch: Architecture) -> dict[str, Rule]:
    """{parameter name in either layer spec, layers counted over the whole model: rule}."""
    return {name: rule for rule in rules(arch) for name in rule.mcore_names}


def check_hf_names(found: Iterable[str], arch: Architecture, *, source: str) -> None:
    """Raise ModelError where a folder's tensors are not those of the architecture; names what differs.

    Stored rotary frequencies are left out, and so is the output layer of a tied model (`HfReader` compares it with
    the embedding).
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
    """Raise ModelError where a Megatron model has a parameter without a rule or lacks one (all stages together).

    The output layer of a tied model may be absent: it exists on a last stage that is not the first one only.
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
    """Whether a stored tensor is no weight, because it follows from config.json."""
    return name.endswith(_DERIVED_SUFFIX)


def listed(names: list[str]) -> str:
    """The first names, and how many follow."""
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
