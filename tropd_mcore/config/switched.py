"""Removes keys of the file if the command line chooses another kind of a section or sets a section to null.

Within the file alone, a key that the chosen kind lacks is an error. Invariants: only keys of the file are removed, and
only keys that another kind of the section has. Each removed key is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tropd_mcore.config.schema import Config

Tree = dict[str, Any]


def kinds_of(tree: Tree) -> dict[str, str]:
    """Return {path: kind} of every section of `tree` that has kinds. If a section names no kind, its default counts."""
    return {path: section.get("kind", default) for path, section, _, default in _discriminated(Config, tree, "")}


def drop_other_kinds(
    tree: Tree, before: Mapping[str, str], places: dict[str, str], from_command_line: str
) -> list[str]:
    """Remove from `tree` the keys that the kinds chosen on the command line lack; returns one line per section.

    `before`: the kinds of the file (`kinds_of`). `places`: dotted key -> place where it was set. `from_command_line`:
    the place of overrides.
    """
    lines = []
    for path, section, kinds, _ in _discriminated(Config, tree, ""):
        new, old = section.get("kind"), before.get(path)
        if new != old and new in kinds and old in kinds and places.get(f"{path}.kind") == from_command_line:
            line = _drop(path, section, kinds[old], kinds[new], places, from_command_line)
            lines += [line] if line is not None else []
    return lines


def take_away(tree: Tree, nulls: list[str]) -> None:
    """Remove the sections, and the keys of other kinds, that overrides set to null. Their defaults apply again."""
    for dotted in nulls:
        *above, last = dotted.split(".")
        node: Any = tree
        for part in above:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and last in node and node[last] is None and _goes_by_null(tree, dotted):
            del node[last]


def _drop(
    path: str,
    section: Tree,
    old: type[BaseModel],
    new: type[BaseModel],
    places: dict[str, str],
    from_command_line: str,
) -> str | None:
    known = set(_all_keys(old, ""))
    dropped = list(_strip(section, new, known, path, "", places, from_command_line))
    if not dropped:
        return None
    of_file = [key for key, place in places.items() if key.startswith(f"{path}.") and place != from_command_line]
    kept = [key for key in of_file if not any(f"{key}.".startswith(f"{gone}.") for gone in dropped)]
    leaves = [key for key in kept if not any(other.startswith(f"{key}.") for other in kept) and key != f"{path}.kind"]
    stays = f"; {', '.join(leaves)} of the file stay" if leaves else ""
    return f"{path}.kind={section['kind']} has no {', '.join(dropped)}: left out of the file's {path}{stays}"


def _strip(
    section: Tree,
    model: type[BaseModel],
    known: set[str],
    path: str,
    below: str,
    places: dict[str, str],
    from_command_line: str,
) -> Iterator[str]:
    """Remove keys that `model` lacks and another kind has, unless the command line set them or a key in them."""
    for key in list(section):
        dotted, inside = f"{path}.{key}", f"{below}{key}"
        on_command_line = any(
            place == from_command_line and f"{name}.".startswith(f"{dotted}.") for name, place in places.items()
        )
        field = model.model_fields.get(key)
        if field is None and on_command_line:
            places[dotted] = from_command_line  # the place of the error, not of the section in the file
        elif field is None and inside in known:
            del section[key]
            yield dotted
        elif field is not None and isinstance(section[key], dict) and (children := _models(field)):
            yield from _strip(section[key], children[0], known, dotted, f"{inside}.", places, from_command_line)


def _discriminated(
    model: type[BaseModel], tree: Tree, prefix: str
) -> Iterator[tuple[str, Tree, dict[str, type[BaseModel]], str]]:
    """(path, values, {kind: class}, default kind) of every section of `tree` that has kinds, including nested ones."""
    for name, field in model.model_fields.items():
        section = tree.get(name)
        if not isinstance(section, dict):
            continue
        models = _models(field)
        if field.discriminator is not None:
            default = str(getattr(field.default, "kind", ""))
            yield f"{prefix}{name}", section, {kind: each for each in models for kind in _kinds(each)}, default
        for each in models:
            if field.discriminator is None or section.get("kind") in _kinds(each):
                yield from _discriminated(each, section, f"{prefix}{name}.")


def _goes_by_null(tree: Tree, dotted: str) -> bool:
    """Whether null can only mean "not set": for a section that is never null, or a key of another kind."""
    models: list[type[BaseModel]] = [Config]
    node: Any = tree
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if not fields:
            return False
        section = node.get(part) if isinstance(node, dict) else None
        if depth == len(parts) - 1:
            chosen = [model for model in models if node.get("kind") in _kinds(model)] or models
            field = next((model.model_fields[part] for model in chosen if part in model.model_fields), None)
            return field is None or (bool(_models(field)) and type(None) not in get_args(field.annotation))
        models, node = [model for field in fields for model in _models(field)], section
    return False


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    field = model.model_fields.get("kind")
    return tuple(get_args(field.annotation)) if field is not None else ()


def _models(field: FieldInfo) -> list[type[BaseModel]]:
    candidates = (field.annotation, *get_args(field.annotation))
    found: list[type[BaseModel]] = []
    for each in candidates:
        for kind in (each, *get_args(each)):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in found:
                found.append(kind)
    return found


def _all_keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for child in _models(field):
            yield from _all_keys(child, f"{prefix}{name}.")
