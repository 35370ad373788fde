"""Turns validation errors into one line each: the place, the key, what was expected, what was found, what to write.

This module does not validate (see `schema`). Invariant: every error of the validator yields exactly one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tropd_mcore.config.aliases import meant_by
from tropd_mcore.config.objectives import KINDS
from tropd_mcore.config.phases import without_phase
from tropd_mcore.config.schema import Config

PHASE_OBJECTIVE = "objective.phases.objective"
"""The section of a phase that has the keys of `objective` itself."""
LISTED_ELSEWHERE = (PHASE_OBJECTIVE, "rollout.servers", "teacher.servers", "teachers")
"""Sections whose keys are those of another one (objective, rollout.server, teacher.server, teacher), where they are
listed."""
SHOWN_KEYS = 3
"""Largest number of keys that one line suggests."""


def explain_validation_error(
    error: ValidationError, places: Mapping[str, str], name: str, renamed: Mapping[str, str]
) -> list[str]:
    """Return one line per problem. `places`: dotted key -> `<file>:<line>` or `command line`; `name`: the file."""
    lines = []
    for detail in error.errors(include_url=False):
        keys = _without_tags(detail["loc"])
        if detail["type"].startswith("union_tag"):
            keys.append("kind")
        dotted = ".".join(keys)
        inside = [place for key, place in places.items() if key.startswith(f"{dotted}.")]
        around = (places[key] for key in _ancestors(keys) if key in places)
        place = places.get(dotted) or next(iter(inside), None) or next(around, name)
        lines.append(f"{place}: {_message(dotted, keys, detail, renamed)}")
    return lines


def wrong_keys(error: ValidationError) -> set[tuple[str, ...]]:
    """Return (section,) or (section, field) of each value that is wrong or missing, or that an unknown key may mean."""
    found: set[tuple[str, ...]] = set()
    for detail in error.errors(include_url=False):
        keys = _without_tags(detail["loc"])
        found.add(tuple(keys[:1]) if detail["type"].startswith("union_tag") else tuple(keys[:2]))
        if detail["type"] == "extra_forbidden":
            found |= {tuple(key.split(".")[:2]) for key in meant(".".join(keys), keys, {})}
    return found


def unknown_keys(error: ValidationError) -> list[str]:
    """Return the dotted keys that the schema does not have."""
    details = error.errors(include_url=False)
    return [".".join(_without_tags(detail["loc"])) for detail in details if detail["type"] == "extra_forbidden"]


def schema_keys() -> dict[str, FieldInfo]:
    """Return {dotted key: field} of every leaf of the schema, in all variants."""
    return dict(_keys(Config, ""))


def _message(dotted: str, keys: list[str], detail: Mapping[str, Any], renamed: Mapping[str, str]) -> str:
    kind, found = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"{dotted}: unknown key{_suggestion(dotted, keys, renamed)}"
    if kind == "missing":
        return f"{dotted}: missing; it has no default"
    if kind in ("model_type", "model_attributes_type"):
        return f"{dotted}: expected a section with keys, found {found!r}"
    if kind == "union_tag_not_found":
        return f"{dotted}: missing; expected one of {', '.join(KINDS)}"
    if kind == "tuple_type":
        return f"{dotted}: expected a list, found {found!r}"
    if kind == "union_tag_invalid":
        return f"{dotted}: expected one of {detail['ctx']['expected_tags']}, found {detail['ctx']['tag']!r}"
    expected = detail["msg"].replace("Input should be ", "expected ").replace("Value error, ", "")
    # pydantic names the type twice: "a valid integer, unable to parse string as an integer"
    expected = expected.partition(", unable to parse")[0]
    return f"{dotted}: {expected}, found {found!r}"


def _suggestion(dotted: str, keys: list[str], renamed: Mapping[str, str]) -> str:
    """The new name of a renamed key, else the keys that it may mean, else the keys of its section."""
    if (alone := without_phase(dotted)) != dotted:
        place = dotted.removesuffix(alone)
        return _suggestion(alone, keys[3:], renamed).replace("objective.", f"{place}objective.")
    if dotted in renamed:
        return f": it was renamed; use {renamed[dotted]}"
    dotted, keys = _without_places(keys)
    if (template := of_template(dotted)) != dotted:
        text = _suggestion(template, template.split("."), renamed)
        if ".servers." in dotted:
            text = re.sub(r"(rollout|teacher)\.server\b", r"\1.servers.*", text)
        if dotted.startswith("teachers."):
            text = re.sub(r"\bteacher\b(?=\.| has )", ".".join(dotted.split(".")[:2]), text)
        return text
    everything = _everything()
    if dotted in everything:
        return f": not a key of the chosen {keys[0]}.kind"
    parent = ".".join(keys[:-1])
    found = meant(dotted, keys, renamed)
    siblings = [key for key in everything if key.rpartition(".")[0] == parent]
    return f"; did you mean {' or '.join(found)}?" if found else f"; {parent or 'the file'} has {_listing(siblings)}"


def meant(dotted: str, keys: list[str], renamed: Mapping[str, str]) -> list[str]:
    """Return the keys that an unknown key may mean: an alias, a similar name in its section, or its name in another."""
    if dotted in renamed:
        return [renamed[dotted]]
    everything, parent, name = _everything(), ".".join(keys[:-1]), keys[-1]
    if by_alias := meant_by(dotted):
        return by_alias[:SHOWN_KEYS]
    siblings = {key.rpartition(".")[2]: key for key in everything if key.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.72)
    if close:
        return [siblings[close[0]]]
    return sorted(key for key in everything if key.rpartition(".")[2] == name)[:2]


def of_template(key: str) -> str:
    """Return a key of an entry of `servers`, without its place, as that of `server`, and a key of an entry of
    `teachers` as that of `teacher`; other keys unchanged."""
    return re.sub(r"^(rollout|teacher)\.servers\.", r"\1.server.", of_teacher(key))


def of_teacher(key: str) -> str:
    """Return a key of an entry of `teachers` as that of `teacher`; other keys unchanged."""
    return re.sub(r"^teachers\.[^.]+\.", "teacher.", key)


def _without_places(keys: list[str]) -> tuple[str, list[str]]:
    """The key without the places of entries in lists."""
    kept = [key for key in keys if not key.isdecimal()]
    return ".".join(kept), kept


@cache
def _everything() -> frozenset[str]:
    """Every key and section of the schema, in all variants."""
    return frozenset(ancestor for key in schema_keys() for ancestor in _ancestors(key.split(".")))


def _listing(keys: list[str]) -> str:
    return ", ".join(sorted(key.rpartition(".")[2] for key in keys))


def _ancestors(keys: list[str]) -> Iterator[str]:
    """The dotted key, then the sections around it, innermost first."""
    for end in range(len(keys), 0, -1):
        yield ".".join(keys[:end])


def _without_tags(loc: tuple[int | str, ...]) -> list[str]:
    """The keys of an error's location, without the chosen `kind`, which the validator inserts and which is no key."""
    keys: list[str] = []
    models: list[type[BaseModel]] = [Config]
    skip_tag = False
    for part in loc:
        if skip_tag:
            skip_tag = False
            continue
        keys.append(str(part))
        if isinstance(part, int):
            continue  # a place in a list of sections, whose class is known already
        fields = [model.model_fields[str(part)] for model in models if str(part) in model.model_fields]
        skip_tag = any(field.discriminator is not None for field in fields)
        models = [model for field in fields for model in _models(field)]
    return keys


def _models(field: FieldInfo) -> list[type[BaseModel]]:
    """The section classes a field can hold: one, its variants, or none for a leaf."""
    candidates = (field.annotation, *get_args(field.annotation))
    return [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _keys(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        models = _models(field) if f"{prefix}{name}" not in LISTED_ELSEWHERE else []
        if not models or get_origin(field.annotation) is tuple:
            yield f"{prefix}{name}", field
        for child in models:
            yield from _keys(child, f"{prefix}{name}.")
